"""One network's training loop: its schedule, averaged weights and checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

console = Console()


class Stage:
    """Trains one module for a number of steps; resumable.

    The learning rate warms up over 100 steps, stays, and falls to zero over the last 40 % of the steps. A
    resumed stage may be given another number of steps, so that a run can be cut short or made longer.

    Args:
        name: of the checkpoint file in ``work``.
        module: what is trained; its weights are averaged (EMA) beside it.
        steps: optimiser steps in all.
        rate: AdamW's learning rate after warm-up.
        resume: go on from the checkpoint where there is one.
    """

    def __init__(
        self, name: str, module: nn.Module, *, steps: int, rate: float, work: Path, resume: bool
    ) -> None:
        self.name, self.module, self.rate, self.steps_in_all, self.step = name, module, rate, steps, 0
        self.optimiser = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.path = work / f"{name}.pt"
        if resume and self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            module.load_state_dict(saved["module"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.average, self.step = saved["average"], saved["step"]

    def steps(self) -> Iterator[int]:
        """The step numbers that are left; saves a checkpoint every minute and at the end."""
        saved = time.monotonic()
        while self.step < self.steps_in_all:
            left = (self.steps_in_all - self.step) / self.steps_in_all
            rate = self.rate * min(1.0, (self.step + 1) / 100) * min(1.0, left / 0.4)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            yield self.step
            self.step += 1
            if time.monotonic() - saved > 60:
                self.save()
                saved = time.monotonic()
        self.save()

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step down the loss, then one step of the average; prints every 50 steps."""
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        keep = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            live = self.module.state_dict()
            floats = [k for k, v in live.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.average[k] for k in floats], [live[k] for k in floats], 1 - keep)
        if self.step % 50 == 0:
            console.print(f"{self.name} step {self.step}/{self.steps_in_all} loss {float(loss.detach()):.4f}")

    def save(self) -> None:
        """Write the checkpoint; a kill in the middle leaves the former one."""
        state = {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def finish(self) -> None:
        """Leave the averaged weights in the module, frozen."""
        self.module.load_state_dict(self.average)
        self.module.requires_grad_(False).eval()
