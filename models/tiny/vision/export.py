"""Writes the trained model as a Hugging Face folder: `python -m models.tiny.vision.export [--checkpoint
FILE]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.tiny.vision.architecture import CONTEXT_LENGTH, IMAGE_TOKENS, build_config, build_model
from models.tiny.vision.drawing import IMAGE_SIZE, PATCH_SIZE
from models.tiny.vision.tokenizer import CHAT_TEMPLATE, load_tokenizer
from models.tiny.vision.tokens import BOS, EOS, PAD, SPECIAL_TOKENS

WEIGHTS = Path(__file__).parent / "weights"

# transformers 5 names the parts otherwise in memory; on disk the original names of LLaVA load everywhere.
_NAMES_ON_DISK = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
)


def name_on_disk(name: str) -> str:
    """The name under which a parameter of the model in memory is saved."""
    for inside, outside in _NAMES_ON_DISK:
        if name.startswith(inside):
            return outside + name.removeprefix(inside)
    return name


def export(state: dict[str, Tensor], folder: Path) -> None:
    """Writes weights (float16), configuration, tokenizer and processor into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name_on_disk(name): value.to(torch.float16).contiguous()
        for name, value in state.items()
        if name != "lm_head.weight" and "position_ids" not in name
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = build_config().to_dict()
    config |= {"architectures": ["LlavaForConditionalGeneration"], "dtype": "float16"}
    _write(folder / "config.json", config)
    # top_k 1 makes greedy answers the default of engines that read this file; there is one right answer.
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "do_sample": True,
        "top_k": 1,
    }
    _write(folder / "generation_config.json", generation)
    load_tokenizer().save(str(folder / "tokenizer.json"))
    pad, bos, eos, *marks = SPECIAL_TOKENS
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "additional_special_tokens": marks,
        "model_max_length": CONTEXT_LENGTH,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", tokenizer)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write(folder / "preprocessor_config.json", image)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
    }
    _write(folder / "processor_config.json", processor)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("var/train-vision/checkpoint.pt"))
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--untrained", action="store_true", help="random weights, to try an engine with")
    args = parser.parse_args()
    state = (
        build_model().state_dict()
        if args.untrained
        else torch.load(args.checkpoint, weights_only=True)["model"]
    )
    export(state, args.folder)
    size = (args.folder / "model.safetensors").stat().st_size
    print(f"{args.folder}: {size / 1e6:.1f} MB, {IMAGE_TOKENS} tokens an image, context {CONTEXT_LENGTH}")


if __name__ == "__main__":
    main()
