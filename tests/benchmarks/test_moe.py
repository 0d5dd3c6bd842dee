"""The batches of the expert-parallel benchmark, and the alternative that it measures against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.moe import EXPERTS, ROUTINGS, SLOTS, Batch, by_slots, draw, popularity
from kernels.moe.expert_parallel import local_experts


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_batch_is_a_routing(routing: str) -> None:
    batch = draw(50, routing, torch.Generator().manual_seed(1))
    assert all(len(set(row)) == SLOTS for row in batch.ids.tolist()), "a token's experts differ"
    assert 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < EXPERTS
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(50))
    again = draw(50, routing, torch.Generator().manual_seed(1))
    assert torch.equal(batch.ids, again.ids), "both workers draw the same"


def test_skewed_routing_has_favourites() -> None:
    shares = popularity("skewed").sort(descending=True).values
    assert shares[0] / shares[-1] == EXPERTS
    assert popularity("uniform").unique().numel() == 1


def test_both_groupings_give_the_kernel_the_same_pairs() -> None:
    """With a kernel that tells tokens and experts apart, so that a mixed-up row shows."""

    def kernel(out: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        pairs.append(ids.numel())
        out.copy_(hidden.float() * (weights * (1.0 + ids)).sum(1, keepdim=True))

    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[::2] = torch.arange(EXPERTS // 2, dtype=torch.int32)
    drawn = draw(30, "uniform", torch.Generator().manual_seed(2))
    batch = Batch(drawn.hidden.float(), drawn.weights, drawn.ids)
    found, wanted = torch.empty_like(batch.hidden), torch.empty_like(batch.hidden)
    pairs: list[int] = []
    by_slots(batch, found, expert_map, kernel)
    split = sum(pairs)
    local_experts(wanted, batch.hidden, batch.weights, batch.ids, expert_map, kernel)
    assert split == pairs[-1] == int((expert_map[batch.ids.long()] >= 0).sum())
    torch.testing.assert_close(found, wanted)
