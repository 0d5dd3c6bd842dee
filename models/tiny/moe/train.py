"""Trains the model: `python -m models.tiny.moe.train --minutes 25 [--resume]`.

Each step draws its own conversations from its number. The learning rate rises, stays, and falls to nothing at
the last step or, if that is earlier, at the end of the time.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from models.tiny.moe.architecture import answer_logits, balance_loss, build_model
from models.tiny.moe.batches import draw_batch, step_rng
from models.tiny.moe.optimizer import Optimizer
from models.tiny.moe.questions import KINDS
from models.tiny.moe.tokenizer import load_tokenizer

DEFAULT_FOLDER = Path("var/train-moe")
TRAINING_SEED = 1
ROWS = 32
_PEAK_RATE = 2e-3
_BALANCE = 0.02
_WARM_UP = 50
# The part of the training over which the learning rate falls to nothing.
_COOL_DOWN = 0.6
_SAVE_SECONDS = 120.0


@dataclass
class Training:
    """The network, its optimizer and how far it has come."""

    model: Any = field(default_factory=build_model)
    tokenizer: Any = field(default_factory=load_tokenizer)
    step: int = 0
    seconds: float = 0.0
    # Not in the checkpoint: a resumed run is told it again.
    more: str | None = None

    def __post_init__(self) -> None:
        self.optimizer = Optimizer(self.model.named_parameters())

    def save(self, file: Path) -> None:
        """Writes a checkpoint; an older one stays whole until the new one is."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.seconds),
        }
        fresh = file.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(file)

    def load(self, file: Path) -> None:
        """Takes up the checkpoint that `save` wrote."""
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["progress"]

    def take_step(self, rate: float, seed: int = TRAINING_SEED) -> dict[str, float]:
        """One step; its losses, and the largest share of an expert times the experts' number (1 = even)."""
        batch = draw_batch(step_rng(self.step, seed), self.tokenizer, ROWS, self.more)
        with torch.autocast("cpu", torch.bfloat16):
            logits, routed = answer_logits(
                self.model, batch.tokens, batch.positions, batch.mask, batch.wanted
            )
        answer = nn.functional.cross_entropy(logits.float(), batch.targets)
        balance, shares = balance_loss(routed, batch.real)
        torch.autograd.backward(answer + _BALANCE * balance)
        self.optimizer.step(rate)
        self.step += 1
        fullest = shares.max().item() * shares.shape[1]
        return {"answer": answer.item(), "balance": balance.item(), "fullest": fullest}


def learning_rate(step: int, steps: int, time_left: float = 1.0) -> float:
    """Warm-up, plateau, straight down to zero at the last step or the end of the time (`time_left`: 1..0)."""
    left = min((steps - step) / steps, time_left) / _COOL_DOWN
    return _PEAK_RATE * min(1.0, (step + 1) / _WARM_UP, max(left, 0.0))


def train(training: Training, steps: int, seconds: float, folder: Path) -> None:
    """Takes the steps, or as many as the time allows, saving as it goes."""
    checkpoint = folder / "checkpoint.pt"
    began = saved = time.monotonic()
    before = training.seconds
    losses: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), refresh_per_second=0.2) as progress:
        task = progress.add_task("train", total=steps, completed=training.step, note="")
        while training.step < steps and time.monotonic() - began < seconds:
            # A resumed run counts the time of the whole.
            passed = before + time.monotonic() - began
            fresh = training.take_step(learning_rate(training.step, steps, 1.0 - passed / (before + seconds)))
            training.seconds = before + time.monotonic() - began
            losses = {name: 0.95 * losses.get(name, value) + 0.05 * value for name, value in fresh.items()}
            note = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            progress.update(task, completed=training.step, note=note)
            if training.step % 50 == 0:
                progress.console.print(f"{training.step}  {note}  {training.seconds:.0f} s")
            if time.monotonic() - saved > _SAVE_SECONDS:
                training.save(checkpoint)
                saved = time.monotonic()
    training.save(checkpoint)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=25.0, help="stop after so long")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--more", choices=KINDS, help="a kind to ask more of")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    training = Training(more=args.more)
    if args.resume:
        training.load(args.folder / "checkpoint.pt")
    nn.Module.train(training.model)
    train(training, args.steps, 60 * args.minutes, args.folder)


if __name__ == "__main__":
    main()
