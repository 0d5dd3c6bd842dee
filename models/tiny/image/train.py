"""Train the tiny text-to-image model: text encoder, then autoencoder, then denoiser.

    python -m models.tiny.image.train --minutes 20 [--resume]

Fixed seeds; each stage writes a checkpoint to the work folder every minute and `--resume` goes
on from it. The minutes are shared out 6 % / 24 % / 70 %.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from models.tiny.image import networks
from models.tiny.image.drawing import COLOURS, SHAPES, draw, random_caption, scenes

WORK = Path("var/train-image")
SIZES = ((64, 64), (64, 64), (64, 64), (64, 64), (64, 64), (64, 64), (64, 96), (96, 64))
console = Console()


class Stage:
    """One network's training loop: its clock, schedule, averaged weights and checkpoint."""

    def __init__(
        self, name: str, module: nn.Module, minutes: float, rate: float, resume: bool
    ) -> None:
        self.name, self.module, self.rate = name, module, rate
        self.seconds, self.spent, self.step = minutes * 60, 0.0, 0
        self.optimiser = torch.optim.AdamW(
            module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.path = WORK / f"{name}.pt"
        if resume and self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            module.load_state_dict(saved["module"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.average, self.step, self.spent = saved["average"], saved["step"], saved["spent"]

    def steps(self) -> Iterator[int]:
        """Step numbers until the stage's time is spent; checkpoints and prints on the way."""
        last, saved = time.monotonic(), time.monotonic()
        while self.spent < self.seconds:
            done = self.spent / self.seconds
            warm = min(1.0, (self.step + 1) / 100)
            rate = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            yield self.step
            now = time.monotonic()
            self.spent, last = self.spent + now - last, now
            self.step += 1
            if now - saved > 60:
                self.save()
                saved = now
        self.save()

    def update(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        keep = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            live = self.module.state_dict()
            floats = [k for k, v in live.items() if v.is_floating_point()]
            torch._foreach_lerp_(
                [self.average[k] for k in floats], [live[k] for k in floats], 1 - keep
            )
        if self.step % 50 == 0:
            done = f"{self.spent:.0f}/{self.seconds:.0f} s"
            console.print(f"{self.name} step {self.step} loss {float(loss):.4f} {done}")

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "step": self.step,
            "spent": self.spent,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def finish(self) -> None:
        """Leave the averaged weights in the module."""
        self.module.load_state_dict(self.average)
        self.module.requires_grad_(False).eval()


def train_text(minutes: float, resume: bool) -> tuple[Any, Any]:
    """Teach the text encoder what a caption says, by naming its three words from the last token.

    This costs a minute and spares the denoiser from finding out which colour belongs to what.
    """
    tokenizer, encoder = networks.build_tokenizer(), networks.build_text_encoder()
    heads = nn.ModuleDict(
        {
            "shape": nn.Linear(128, len(SHAPES)),
            "colour": nn.Linear(128, len(COLOURS)),
            "background": nn.Linear(128, len(COLOURS)),
        }
    )
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})
    stage = Stage("text", both, minutes, 1e-3, resume)
    train, _ = scenes()
    rng = random.Random(1 + stage.step)
    colours = list(COLOURS)
    for _step in stage.steps():
        batch = rng.choices(train, k=64)
        ids = tokens(tokenizer, [random_caption(s, rng) for s in batch])
        last = encoder(ids).last_hidden_state[:, -1]
        loss = (
            functional.cross_entropy(
                heads["shape"](last), torch.tensor([SHAPES.index(s.shape) for s in batch])
            )
            + functional.cross_entropy(
                heads["colour"](last), torch.tensor([colours.index(s.colour) for s in batch])
            )
            + functional.cross_entropy(
                heads["background"](last),
                torch.tensor([colours.index(s.background) for s in batch]),
            )
        )
        stage.update(loss)
    stage.finish()
    return tokenizer, encoder


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


def train_autoencoder(minutes: float, resume: bool) -> Any:
    """Pictures to latents and back: L1, with noise on the latents so that they are smooth."""
    torch.manual_seed(2)
    model = networks.build_autoencoder().to(memory_format=torch.channels_last)
    stage = Stage("autoencoder", model, minutes, 2e-3, resume)
    every = sum(scenes(), [])
    rng = random.Random(2 + stage.step)
    generator = torch.Generator().manual_seed(2 + stage.step)
    for _step in stage.steps():
        size = 64 if rng.random() < 0.7 else 48
        pictures = draw(rng.choices(every, k=32), size, size, generator) * 2 - 1
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


def train_denoiser(
    tokenizer: Any, encoder: Any, autoencoder: Any, minutes: float, resume: bool
) -> Any:
    """Flow matching: predict noise - latents on the straight path between them."""
    torch.manual_seed(3)
    model = networks.build_denoiser().to(memory_format=torch.channels_last)
    console.print(f"denoiser {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    stage = Stage("denoiser", model, minutes, 1.5e-3, resume)
    train, _ = scenes()
    rng = random.Random(3 + stage.step)
    generator = torch.Generator().manual_seed(3 + stage.step)
    scale = autoencoder.config.scaling_factor
    for _step in stage.steps():
        height, width = rng.choice(SIZES)
        batch = rng.choices(train, k=32)
        captions = ["" if rng.random() < 0.1 else random_caption(s, rng) for s in batch]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pictures = draw(batch, height, width, generator) * 2 - 1
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            clean = autoencoder.encoder(pictures).float() * scale
            words = encoder(tokens(tokenizer, captions)).last_hidden_state.float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(batch), generator=generator) + 0.2)
        part = sigma[:, None, None, None]
        mixed = (1 - part) * clean + part * noise
        with torch.autocast("cpu", torch.bfloat16):
            flow = model(
                mixed.contiguous(memory_format=torch.channels_last), sigma * 1000, words
            ).sample
        stage.update(functional.mse_loss(flow.float(), noise - clean))
    stage.finish()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    tokenizer, encoder = train_text(options.minutes * 0.06, options.resume)
    autoencoder = train_autoencoder(options.minutes * 0.24, options.resume)
    train_denoiser(tokenizer, encoder, autoencoder, options.minutes * 0.70, options.resume)


if __name__ == "__main__":
    main()
