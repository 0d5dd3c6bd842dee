"""Write the tiny model as an ordinary diffusers pipeline folder, in half precision.

    python -m models.tiny.image.export [--work var/train-image] [--out models/tiny/image/weights]

makes one out of the checkpoints of a training that still runs or was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import models.tiny.vision.plain_torch  # noqa: F401 - must come before diffusers and transformers
from models.tiny.image import networks
from models.tiny.image.drawing import draw, scenes

WEIGHTS = Path(__file__).parent / "weights"


def save(folder: Path, tokenizer: Any, encoder: Any, autoencoder: Any, denoiser: Any) -> None:
    """Write the pipeline; the parts' folders of an earlier one are replaced, other files stay.

    The denoiser goes last and the index after it, so a folder with ``model_index.json`` is whole.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=encoder.half(),
        tokenizer=tokenizer,
        unet=denoiser.half(),
        scheduler=networks.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    # AutoencoderTiny writes this and warns of it when it reads it: it makes it anew itself.
    facts = part / "vae" / "config.json"
    kept = {k: v for k, v in json.loads(facts.read_text()).items() if k != "block_out_channels"}
    facts.write_text(json.dumps(kept, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").unlink(missing_ok=True)
    for made in sorted(part.iterdir(), key=lambda path: path.is_file()):
        target = folder / made.name
        if target.is_dir():
            shutil.rmtree(target)
        made.replace(target)
    part.rmdir()


def load(folder: Path) -> Any:
    """The pipeline of a folder, in single precision on the CPU."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def averages(work: Path) -> tuple[Any, Any, Any, Any]:
    """(tokenizer, text encoder, autoencoder, denoiser) with the averaged weights of the checkpoints.

    Raises:
        FileNotFoundError: a stage has no checkpoint yet.
    """
    tokenizer, encoder = networks.build_tokenizer(), networks.build_text_encoder()
    autoencoder, denoiser = networks.build_autoencoder(), networks.build_denoiser()
    saved = {
        name: torch.load(work / f"{name}.pt", weights_only=True)["average"]
        for name in ("text", "autoencoder", "denoiser")
    }
    prefix = "encoder."
    words = {k.removeprefix(prefix): v for k, v in saved["text"].items() if k.startswith(prefix)}
    encoder.load_state_dict(words)
    autoencoder.load_state_dict(saved["autoencoder"])
    denoiser.load_state_dict(saved["denoiser"])
    if (work / "decoder.pt").exists():
        autoencoder.decoder.load_state_dict(torch.load(work / "decoder.pt", weights_only=True)["average"])
    every = [scene for part in scenes() for scene in part]
    with torch.no_grad():
        latents = autoencoder.encoder(draw(every, 64, 64, torch.Generator().manual_seed(2)) * 2 - 1)
    autoencoder.register_to_config(scaling_factor=float(1 / latents.std()))
    return tokenizer, encoder, autoencoder, denoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("var/train-image"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    save(options.out, *averages(options.work))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
