"""Muon for the matrices inside the network, the experts' stacks of matrices among them; AdamW for the rest.

Muon: Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; torch's own takes
no stacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_DECAY = 0.02
# The quintic iteration that drives all singular values near 1, from the publication.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal part of each matrix of (..., rows, columns), whatever its length."""
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x: Tensor = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Optimizer:
    """Both behind one `step`; the learning rate is the same number for both (Muon's is scaled to match)."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named:
            inside = parameter.ndim >= 2 and ".layers." in name and ".gate.weight" not in name
            (self._matrices if inside else others).append(parameter)
        self._parameters = self._matrices + others
        self._momenta = [torch.zeros_like(parameter) for parameter in self._matrices]
        self._others = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))

    def step(self, rate: float) -> None:
        """Clips the gradients' norm to 1, takes one step at this learning rate and clears the gradients."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        with torch.no_grad():
            for parameter, momentum in zip(self._matrices, self._momenta, strict=True):
                if parameter.grad is None:
                    continue
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                ahead = parameter.grad.lerp(momentum, _MOMENTUM)
                # As large as a step of AdamW usually is.
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - rate * _DECAY).sub_(orthogonal(ahead), alpha=rate * scale)
        for group in self._others.param_groups:
            group["lr"] = rate
        self._others.step()
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes to go on."""
        return {"momenta": self._momenta, "others": self._others.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` gave."""
        self._momenta = state["momenta"]
        self._others.load_state_dict(state["others"])
