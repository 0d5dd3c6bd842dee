"""What a layer of experts computes, one (token, expert) pair at a time: slow, and plain to read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def experts_reference(
    hidden: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None
) -> Tensor:
    """Each token's weighted sum over its experts of ``w2 @ (silu(gate @ x) * (up @ x))``.

    Args:
        hidden: tokens, shape (tokens, hidden).
        w13: gate over up of each expert that is here, shape (local experts, 2 * intermediate, hidden).
        w2: shape (local experts, hidden, intermediate).
        weights: of each token's experts, shape (tokens, k).
        ids: each token's experts, global numbers, shape (tokens, k); one may come more than once.
        expert_map: shape (experts,): an expert's place in ``w13``, -1 where it stands on another rank and
            adds nothing here. None: all are here, in order.

    Returns:
        Shape (tokens, hidden), float64: no rounding of its own to speak of.
    """
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, (row, chosen) in enumerate(zip(weights.double(), ids.tolist(), strict=True)):
        for weight, expert in zip(row, chosen, strict=True):
            place = expert if expert_map is None else int(expert_map[expert])
            if place >= 0:
                gate, up = (w13[place].double() @ hidden[token].double()).chunk(2)
                out[token] += weight * (w2[place].double() @ (silu(gate) * up))
    return out
