"""Trains the model: `python -m models.tiny.vision.train --minutes 60 [--resume]`.

Two stages. "see": the vision tower alone learns what each patch shows. "answer": the whole model learns
to answer, while the patches are still asked about. Each step draws its own scenes from its number, so a
resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import nn

from models.tiny.vision.architecture import PatchReader, build_model, patch_features, to_input
from models.tiny.vision.batches import LABELS, TRAINING_SEED, draw_batch, step_rng
from models.tiny.vision.export import WEIGHTS, name_on_disk
from models.tiny.vision.optimizer import Optimizer

_EMBEDDING = "model.language_model.embed_tokens.weight"
DEFAULT_FOLDER = Path("var/train-vision")
SEE_BATCH = 64
SEEN_BATCH = 40
TOLD_BATCH = 12
_SAVE_SECONDS = 120.0
_WARM_UP = 100
_SEE_RATE = 2e-3
_ANSWER_RATE = 1.5e-3
# The part of the answer stage over which its learning rate falls to nothing.
_COOL_DOWN = 0.7


@dataclass(frozen=True)
class Plan:
    """How many steps each stage takes, and for how many seconds this call may run."""

    see_steps: int
    answer_steps: int
    seconds: float
    folder: Path
    # Whether the learning rate is to have fallen to nothing when the time is over.
    finish: bool = False
    answer_rate: float = _ANSWER_RATE


@dataclass
class Training:
    """The network, its optimizer and how far it has come."""

    model: Any = field(default_factory=build_model)
    reader: PatchReader = field(default_factory=PatchReader)
    see_step: int = 0
    answer_step: int = 0
    seconds: float = 0.0
    # Not in the checkpoint: a resumed run is told it again.
    seed: int = TRAINING_SEED

    def __post_init__(self) -> None:
        named = [*self.model.named_parameters(), *self.reader.named_parameters(prefix="reader")]
        # The tower's last norm is part of CLIP but not on LLaVA's path.
        self.optimizer = Optimizer((n, p) for n, p in named if "post_layernorm" not in n)

    def save(self, file: Path) -> None:
        """Writes a checkpoint; an older one stays whole until the new one is."""
        state = {
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.see_step, self.answer_step, self.seconds),
        }
        fresh = file.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(file)

    def load(self, file: Path) -> None:
        """Takes up the checkpoint that `save` wrote."""
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.see_step, self.answer_step, self.seconds = state["progress"]

    def load_weights(self, file: Path) -> None:
        """Starts from exported weights (a model.safetensors); optimizer and reader begin anew."""
        tensors = load_file(file)
        state = self.model.state_dict()
        kept = {name: tensors[name_on_disk(name)] for name in state if name_on_disk(name) in tensors}
        self.model.load_state_dict({**state, **kept, "lm_head.weight": kept[_EMBEDDING]})


def see_step(training: Training) -> dict[str, float]:
    """One step of the first stage; its losses by name."""
    sight = draw_batch(step_rng("see", training.see_step, training.seed), SEE_BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        losses = training.reader(patch_features(training.model, to_input(sight.pixels)), sight.labels)
    torch.autograd.backward(training.reader.total(losses))
    training.optimizer.step(_SEE_RATE * min(1.0, (training.see_step + 1) / _WARM_UP))
    training.see_step += 1
    return dict(zip(LABELS, losses.detach().tolist(), strict=True))


def answer_rate(step: int, steps: int, time_left: float = 1.0, peak: float = _ANSWER_RATE) -> float:
    """The learning rate of a step of the answer stage: warm-up, plateau, straight down to zero.

    Zero comes with the last step or, if that is earlier, with the end of the time (`time_left`: 1..0).
    """
    left = min((steps - step) / steps, time_left) / _COOL_DOWN
    return peak * min(1.0, (step + 1) / _WARM_UP, max(left, 0.0))


def train(plan: Plan, training: Training) -> None:
    """Goes through both stages, or as far as the time allows, saving as it goes."""
    from models.tiny.vision.lessons import Teacher, answer_step

    checkpoint = plan.folder / "checkpoint.pt"
    began = saved = time.monotonic()
    losses: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), refresh_per_second=0.2) as progress:
        see = progress.add_task("see", total=plan.see_steps, completed=training.see_step, note="")
        answer = progress.add_task("answer", total=plan.answer_steps, completed=training.answer_step, note="")
        teacher: Teacher | None = None
        while training.answer_step < plan.answer_steps and time.monotonic() - began < plan.seconds:
            tick = time.monotonic()
            if training.see_step < plan.see_steps:
                fresh = see_step(training)
                task, done = see, training.see_step
            else:
                teacher = teacher or Teacher()
                time_left = 1.0 - (time.monotonic() - began) / plan.seconds if plan.finish else 1.0
                rate = answer_rate(training.answer_step, plan.answer_steps, time_left, plan.answer_rate)
                fresh = answer_step(training, teacher, SEEN_BATCH, TOLD_BATCH, rate)
                task, done = answer, training.answer_step
            training.seconds += time.monotonic() - tick
            losses = {name: 0.97 * losses.get(name, value) + 0.03 * value for name, value in fresh.items()}
            note = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            progress.update(task, completed=done, note=note)
            if done % 50 == 0:
                progress.console.print(
                    f"{progress.tasks[task].description} {done}  {note}  {training.seconds:.0f} s"
                )
            if time.monotonic() - saved > _SAVE_SECONDS:
                training.save(checkpoint)
                saved = time.monotonic()
    training.save(checkpoint)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=600.0, help="stop (resumably) after so long")
    parser.add_argument("--finish", action="store_true", help="let the rate fall to nothing by then")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--continue-weights", action="store_true", help="go on from the committed weights")
    parser.add_argument("--see-steps", type=int, default=1500)
    parser.add_argument("--answer-steps", type=int, default=3000)
    parser.add_argument("--answer-rate", type=float, default=_ANSWER_RATE, help="the second stage's highest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=TRAINING_SEED, help="another one draws other scenes")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    training = Training(seed=args.seed)
    if args.resume:
        training.load(args.folder / "checkpoint.pt")
    elif args.continue_weights:
        training.load_weights(WEIGHTS / "model.safetensors")
    nn.Module.train(training.model)
    seconds = 60 * args.minutes
    train(
        Plan(args.see_steps, args.answer_steps, seconds, args.folder, args.finish, args.answer_rate), training
    )


if __name__ == "__main__":
    main()
