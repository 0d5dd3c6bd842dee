"""Train the tiny text-to-image model: text encoder, autoencoder, denoiser, and the decoder once more.

    python -m models.tiny.image.train [--resume] [--steps 4000]
    python -m models.tiny.image.train --continue-weights models/tiny/image/weights

Fixed seeds. Every stage writes a checkpoint to the work folder each minute and ``--resume`` goes on from it,
with another number of steps if so asked. ``--continue-weights`` starts the denoiser from an exported pipeline
and leaves its text encoder and autoencoder as they are.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import models.tiny.vision.plain_torch  # noqa: F401 - must come before diffusers and transformers
from models.tiny.image import export, networks
from models.tiny.image.captions import random_caption
from models.tiny.image.drawing import COLOURS, SHAPES, Scene, draw, scenes
from models.tiny.image.stage import Stage, console

WORK = Path("var/train-image")
#: (height, width) of a batch of training pictures; most are square, so that wide and tall ones work too.
SIZES = ((64, 64), (64, 64), (64, 64), (64, 64), (64, 64), (64, 64), (64, 96), (96, 64))
BATCH = 32


def tokens(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """[N, MAX_TOKENS] ids, padded as the pipeline pads them."""
    ids: torch.Tensor = tokenizer(
        captions,
        padding="max_length",
        max_length=networks.MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def train_text(steps: int, resume: bool) -> tuple[Any, Any]:
    """Teach the text encoder what a caption says, by naming its three words from every token after it.

    This costs a minute or two and spares the denoiser from finding out which colour belongs to what: most of
    what its cross-attention sees is padding, and each padding token then says it all.
    """
    torch.manual_seed(1)
    tokenizer, encoder = networks.build_tokenizer(), networks.build_text_encoder()
    sizes = {"shape": len(SHAPES), "colour": len(COLOURS), "background": len(COLOURS)}
    heads = nn.ModuleDict({name: nn.Linear(128, size) for name, size in sizes.items()})
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})
    stage = Stage("text", both, steps=steps, rate=1e-3, work=WORK, resume=resume)
    train, _ = scenes()
    rng = random.Random(1 + stage.step)
    colours = list(COLOURS)
    for step in stage.steps():
        batch = rng.choices(train, k=64)
        ids = tokens(tokenizer, [random_caption(s, rng) for s in batch])
        after = (ids == tokenizer.eos_token_id) | (ids == tokenizer.pad_token_id)
        hidden = encoder(ids).last_hidden_state
        truth = {
            "shape": [SHAPES.index(s.shape) for s in batch],
            "colour": [colours.index(s.colour) for s in batch],
            "background": [colours.index(s.background) for s in batch],
        }
        loss, right = torch.zeros(()), torch.ones(len(batch), dtype=torch.bool)
        for name, answers in truth.items():
            scores = heads[name](hidden)
            wanted = torch.tensor(answers)[:, None].expand_as(ids)
            loss = loss + functional.cross_entropy(scores[after], wanted[after])
            right &= scores[:, -1].argmax(-1) == wanted[:, -1]
        stage.update(loss)
        if step % 50 == 0:
            console.print(f"text: {float(right.float().mean()):.0%} of the captions read rightly")
    stage.finish()
    return tokenizer, encoder


def train_autoencoder(steps: int, resume: bool) -> Any:
    """Pictures to latents and back; noise on the latents makes small errors in them small in the picture."""
    torch.manual_seed(2)
    model = networks.build_autoencoder().to(memory_format=torch.channels_last)
    stage = Stage("autoencoder", model, steps=steps, rate=1e-3, work=WORK, resume=resume)
    every = [scene for part in scenes() for scene in part]
    rng = random.Random(2 + stage.step)
    generator = torch.Generator().manual_seed(2 + stage.step)
    for _step in stage.steps():
        pictures = draw(rng.choices(every, k=BATCH), 64, 64, generator) * 2 - 1
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(pictures).float()
            noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator)
            back = model.decoder(noisy.contiguous(memory_format=torch.channels_last)).float()
        loss = functional.l1_loss(back, pictures) + functional.mse_loss(back, pictures)
        stage.update(loss + 1e-3 * latents.square().mean())
    stage.finish()
    with torch.no_grad():
        pictures = draw(every, 64, 64, generator) * 2 - 1
        latents = model.encoder(pictures)
        model.register_to_config(scaling_factor=float(1 / latents.std()))
        error = float(functional.l1_loss(model.decoder(latents), pictures))
    console.print(f"autoencoder L1 {error:.4f} (of 2), scale {model.config.scaling_factor:.3f}")
    return model


def train_decoder(model: Any, steps: int, resume: bool) -> None:
    """Sharpen the decoder while the encoder, and so what the denoiser has learnt, stays as it is."""
    torch.manual_seed(5)
    decoder = model.decoder.requires_grad_(True).train().to(memory_format=torch.channels_last)
    stage = Stage("decoder", decoder, steps=steps, rate=5e-4, work=WORK, resume=resume)
    every = [scene for part in scenes() for scene in part]
    rng = random.Random(5 + stage.step)
    generator = torch.Generator().manual_seed(5 + stage.step)
    for _step in stage.steps():
        height, width = rng.choice(SIZES)
        pictures = draw(rng.choices(every, k=BATCH), height, width, generator) * 2 - 1
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = model.encoder(pictures).float()
            noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator)
            back = decoder(noisy.contiguous(memory_format=torch.channels_last)).float()
        stage.update(functional.l1_loss(back, pictures) + functional.mse_loss(back, pictures))
    stage.finish()


class LatentPictures:
    """Latents of training pictures, encoded once: encoding anew each step would cost more than it teaches.

    Args:
        copies: drawings of each scene, each at its own place and size.
    """

    def __init__(self, autoencoder: Any, train: list[Scene], copies: int) -> None:
        self.train = train
        generator = torch.Generator().manual_seed(4)
        self.by_size: dict[tuple[int, int], torch.Tensor] = {}
        for height, width in dict.fromkeys(SIZES):
            rounds = []
            for _ in range(copies if height == width else copies // 3):
                pictures = draw(train, height, width, generator) * 2 - 1
                with torch.no_grad():
                    rounds.append(autoencoder.encoder(pictures) * autoencoder.config.scaling_factor)
            self.by_size[height, width] = torch.stack(rounds)
        console.print("latents encoded")

    def batch(self, rng: random.Random) -> tuple[list[Scene], torch.Tensor]:
        """BATCH scenes and their latents [BATCH, channels, h, w], all of one size."""
        latents = self.by_size[rng.choice(SIZES)]
        copies = torch.tensor([rng.randrange(len(latents)) for _ in range(BATCH)])
        picks = [rng.randrange(len(self.train)) for _ in range(BATCH)]
        return [self.train[i] for i in picks], latents[copies, torch.tensor(picks)]


def train_denoiser(
    tokenizer: Any, encoder: Any, autoencoder: Any, model: Any, steps: int, rate: float, resume: bool
) -> Any:
    """Flow matching: predict noise - latents on the straight path between them."""
    console.print(f"denoiser {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    model = model.requires_grad_(True).train().to(memory_format=torch.channels_last)
    stage = Stage("denoiser", model, steps=steps, rate=rate, work=WORK, resume=resume)
    train, _ = scenes()
    pictures = LatentPictures(autoencoder, train, copies=48)
    rng = random.Random(3 + stage.step)
    generator = torch.Generator().manual_seed(3 + stage.step)
    for _step in stage.steps():
        batch, clean = pictures.batch(rng)
        captions = ["" if rng.random() < 0.1 else random_caption(s, rng) for s in batch]
        with torch.no_grad():
            words = encoder(tokens(tokenizer, captions)).last_hidden_state
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(batch), generator=generator) + 0.2)
        part = sigma[:, None, None, None]
        mixed = ((1 - part) * clean + part * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            flow = model(mixed, sigma * 1000, words).sample
        stage.update(functional.mse_loss(flow.float(), noise - clean))
    stage.finish()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text-steps", type=int, default=1700)
    parser.add_argument("--autoencoder-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=4200, help="of the denoiser")
    parser.add_argument("--decoder-steps", type=int, default=800, help="of the decoder, at the end")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the denoiser")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help=f"go on from the checkpoints in {WORK}")
    parser.add_argument("--continue-weights", type=Path, help="an exported pipeline to start from")
    parser.add_argument("--out", type=Path, default=export.WEIGHTS, help="where the pipeline is written")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    if options.continue_weights:
        pipeline = export.load(options.continue_weights)
        tokenizer, encoder, autoencoder = pipeline.tokenizer, pipeline.text_encoder, pipeline.vae
        denoiser = pipeline.unet
    else:
        tokenizer, encoder = train_text(options.text_steps, options.resume)
        autoencoder = train_autoencoder(options.autoencoder_steps, options.resume)
        torch.manual_seed(3)
        denoiser = networks.build_denoiser()
    denoiser = train_denoiser(
        tokenizer, encoder, autoencoder, denoiser, options.steps, options.rate, options.resume
    )
    train_decoder(autoencoder, options.decoder_steps, options.resume)
    export.save(options.out, tokenizer, encoder, autoencoder, denoiser)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
