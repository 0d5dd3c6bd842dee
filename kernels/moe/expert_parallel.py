"""One rank's share of a layer of experts, without work for the experts of other ranks.

Under expert parallelism each rank sees every token but holds only some experts; the ranks' results are summed
afterwards. Giving remote experts zero weight is right and wasteful: with two ranks half of the arithmetic is
thrown away. Here the remote (token, expert) pairs never reach the kernel.

vLLM's CPU kernel groups its (token, slot) pairs by expert by itself and runs one matrix product per expert
that has any, so its cost is that of the pairs, whatever the number of slots a token has. A ragged set of
pairs is therefore given to it as tokens with one slot each: gathered before, summed per token after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

#: Runs the experts that are here: (out, hidden, weights, local ids), as the arguments of ``local_experts``.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def local_experts(
    output: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor, kernel: Kernel
) -> None:
    """Writes this rank's part of each token's weighted sum of experts into ``output``.

    Args:
        output: shape (tokens, hidden); all of it is written, zeros for a token without an expert here.
        hidden: the tokens, shape (tokens, hidden).
        weights: of each token's experts, shape (tokens, k).
        ids: each token's experts, global numbers, shape (tokens, k).
        expert_map: shape (experts,): an expert's number on this rank, -1 where it stands on another.
        kernel: called at most once, with contiguous tensors, ids of int32 that are all of this rank and at
            least one row and one slot; it must write all of its output.
    """
    tokens, slots = ids.shape
    places = expert_map[ids.long()].to(torch.int32)
    here = places >= 0
    pairs = here.view(-1).nonzero().squeeze(1)
    if len(pairs) == 0:
        output.zero_()
        return
    pair_weights, pair_places = weights.reshape(-1)[pairs], places.view(-1)[pairs]
    counts = here.sum(1)
    each, rest = divmod(len(pairs), tokens)
    if rest == 0 and bool((counts == each).all()):
        # As many for each token (so for a single one): no need to take tokens apart, the kernel sums.
        kernel(output, hidden.contiguous(), pair_weights.view(tokens, each), pair_places.view(tokens, each))
        return
    owners = pairs.div(slots, rounding_mode="floor")
    parts = output.new_empty(len(pairs), output.shape[1])
    kernel(parts, hidden[owners], pair_weights[:, None], pair_places[:, None])
    # A token's pairs follow each other. Of torch's ways to sum runs of rows this is by far the fastest; it
    # sums bfloat16 in float32, as the kernel does: one rounding more per pair than there, not one per sum.
    output.copy_(embedding_bag(torch.arange(len(pairs)), parts, counts.cumsum(0) - counts, mode="sum"))
