"""Muon for the matrices inside the network, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_INSIDE = (".layers.", "multi_modal_projector")


class Optimizer:
    """Both optimizers behind one `step`; the learning rate is the same number for both (Muon's is scaled
    to match)."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named:
            inside = parameter.ndim == 2 and any(mark in name for mark in _INSIDE)
            (matrices if inside else others).append(parameter)
        self._parameters = matrices + others
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def step(self, rate: float) -> None:
        """Clips the gradients' norm to 1, takes one step at this learning rate and clears the gradients."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """What `load_state_dict` takes to go on."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Takes up the state that `state_dict` gave."""
        for part, saved in zip(self._parts, state, strict=True):
            part.load_state_dict(saved)
