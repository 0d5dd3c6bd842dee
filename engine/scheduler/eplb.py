"""Which GPU holds which experts, from measured loads: DeepSeek's expert-parallelism load balancer (EPLB).

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), section 3.4, and the algorithm as published in
github.com/deepseek-ai/EPLB. A layer's busiest experts get redundant copies that share their tokens, and the
copies are packed so that all GPUs have the same number of slots and as equal a load as a greedy finds:

- *hierarchical* (prefill; needs a whole number of expert groups on each node): groups are packed to nodes, so
  that group-limited routing stays inside them; experts are copied within their node, and the copies packed to
  its GPUs;
- *global* (decode): the same as if all GPUs stood in one node and groups did not matter.

Copying gives one slot after the other to the expert with the most load per copy, which makes the largest
load of a copy as small as it can be. Packing takes the heaviest first, each to the least loaded part that
still has a slot (longest processing time first). Two details are ours: an expert gets no more copies than
there are GPUs for them; and a layer for which dealing experts out in order is better, as a greedy cannot rule
out, keeps that order, so that no layer is worse than linear placement without copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.balance import Floats, balancedness, overall

Ints = NDArray[np.int64]
Policy = Literal["auto", "hierarchical", "global"]


class LoadsError(ValueError):
    """The loads or the shape of the cluster cannot be planned with; the message says what to change."""


@dataclass(frozen=True)
class ExpertPlacement:
    """Where the experts of every layer stand, and what is expected of it under the loads it was made for."""

    #: [layers, experts]: the loads, any unit.
    loads: Floats
    #: [layers, slots]: the expert in each slot; GPU ``g`` has slots ``g * slots / gpus`` and following.
    physical_to_logical: Ints
    gpus: int
    policy: Literal["given", "linear", "hierarchical", "global"]

    @cached_property
    def copies(self) -> Ints:
        """[layers, experts]: in how many slots each expert stands."""
        counts = np.zeros(self.loads.shape, dtype=np.int64)
        rows = np.arange(len(counts))[:, None]
        np.add.at(counts, (rows, self.physical_to_logical), 1)
        return counts

    @cached_property
    def logical_to_physical(self) -> Ints:
        """[layers, experts, most copies]: the slots of each expert in their order, then -1."""
        layers, slots = self.physical_to_logical.shape
        most = int(self.copies.max())
        found = np.full((*self.loads.shape, most), -1, dtype=np.int64)
        order = np.argsort(self.physical_to_logical, axis=1, kind="stable")
        experts = np.take_along_axis(self.physical_to_logical, order, axis=1)
        first = np.cumsum(self.copies, axis=1) - self.copies
        rank = np.arange(slots)[None, :] - np.take_along_axis(first, experts, axis=1)
        found[np.arange(layers)[:, None], experts, rank] = order
        return found

    @cached_property
    def gpu_loads(self) -> Floats:
        """[layers, gpus]: expected load, an expert's tokens being shared evenly by its copies."""
        share = np.take_along_axis(self.loads / self.copies, self.physical_to_logical, axis=1)
        loads: Floats = share.reshape(len(share), self.gpus, -1).sum(axis=2)
        return loads

    @cached_property
    def balancedness(self) -> Floats:
        """[layers]: mean over maximum of the GPUs' loads."""
        return balancedness(self.gpu_loads)

    @property
    def overall(self) -> float | None:
        """All layers in one figure; None without any load."""
        return overall(self.gpu_loads)


def linear(
    loads: NDArray[Any] | Sequence[Sequence[float]], *, gpus: int, redundant: int = 0
) -> ExpertPlacement:
    """Experts in their order, the redundant slots at the end filled from the first on, as vLLM starts.

    Raises:
        LoadsError: the loads are no such table, or the slots cannot be shared out evenly.
    """
    table = _checked(loads, gpus=gpus, nodes=1, groups=1, redundant=redundant)
    layers, experts = table.shape
    order = np.arange(experts + redundant, dtype=np.int64) % experts
    return ExpertPlacement(table, np.tile(order, (layers, 1)), gpus, "linear")


def standing(loads: Any, placement: Any, *, gpus: int) -> ExpertPlacement:
    """A placement that is there already, under these loads.

    Args:
        loads: [layers, experts].
        placement: [layers, slots], the expert in each slot, as ``physical_to_logical``.
        gpus: that the slots are shared out to, in their order.

    Raises:
        LoadsError: the two do not fit together, or an expert has no slot.
    """
    try:
        slots = np.asarray(placement)
    except ValueError:
        slots = np.zeros(0)
    if slots.ndim != 2 or slots.dtype.kind not in "iu" or 0 in slots.shape:
        raise LoadsError("the placement is no table of experts' numbers: [layers, slots]")
    experts = _table(loads).shape[1]
    if slots.shape[1] < experts:
        raise LoadsError(f"the placement has {slots.shape[1]} slots for {experts} experts")
    table = _checked(loads, gpus=gpus, nodes=1, groups=1, redundant=slots.shape[1] - experts)
    if len(slots) != len(table):
        raise LoadsError(f"the placement has {len(slots)} layers and the loads have {len(table)}")
    found = ExpertPlacement(table, slots.astype(np.int64), gpus, "given")
    if slots.min() < 0 or slots.max() >= experts:
        raise LoadsError(f"the placement names experts beyond 0 to {experts - 1}")
    if (found.copies == 0).any():
        layer, expert = (int(i) for i in np.argwhere(found.copies == 0)[0])
        raise LoadsError(f"the placement has no slot for expert {expert} of layer {layer}")
    return found


def rebalance(
    loads: NDArray[Any] | Sequence[Sequence[float]],
    *,
    gpus: int,
    nodes: int = 1,
    groups: int = 1,
    redundant: int = 0,
    policy: Policy = "auto",
) -> ExpertPlacement:
    """The placement that EPLB makes for measured loads.

    Args:
        loads: [layers, experts], tokens that each expert has had. One without any still has its slot.
        gpus: expert-parallel ranks.
        nodes: machines that they stand in, equally many in each.
        groups: expert groups of the model's router (`n_group`), consecutive experts each; 1 = it has none.
        redundant: slots beyond one for each expert.
        policy: "auto" is hierarchical where the groups can be shared out evenly among the nodes, else global.

    Raises:
        LoadsError: the loads are no such table, or something does not divide evenly.
    """
    table = _checked(loads, gpus=gpus, nodes=nodes, groups=groups, redundant=redundant)
    if policy == "hierarchical" and groups % nodes:
        raise LoadsError(
            f"{groups} expert group(s) cannot be shared out evenly among {nodes} nodes. Take the global "
            "policy, or a number of nodes that divides the groups."
        )
    whole = policy == "global" or groups % nodes != 0
    if whole:
        nodes = groups = 1
    found = _hierarchical(table, gpus=gpus, nodes=nodes, groups=groups, redundant=redundant)
    name: Literal["hierarchical", "global"] = "global" if whole else "hierarchical"
    best = ExpertPlacement(table, found, gpus, name)
    for order in _in_order(table.shape[1], gpus=gpus, redundant=redundant, one_node=nodes == 1):
        plain = ExpertPlacement(table, np.tile(order, (len(table), 1)), gpus, name)
        better = plain.gpu_loads.max(axis=1) < best.gpu_loads.max(axis=1)
        if better.any():
            mixed = np.where(better[:, None], plain.physical_to_logical, best.physical_to_logical)
            best = ExpertPlacement(table, mixed, gpus, name)
    return best


def replicate(loads: Floats, slots: int, most: int) -> Ints:
    """How many copies each expert gets, at most ``most``: [rows, experts], each row summing up to ``slots``.

    Each slot beyond one for each expert goes where the load per copy is largest.
    """
    copies = np.ones(loads.shape, dtype=np.int64)
    rows = np.arange(len(loads))
    for _ in range(slots - loads.shape[1]):
        wanting = np.where(copies < most, loads / copies, -1.0)
        copies[rows, wanting.argmax(axis=1)] += 1
    return copies


def pack(weights: Floats, parts: int) -> Ints:
    """Shares items out: [rows, items], the part of each, all parts with the same number of items.

    The heaviest first, each to the least loaded part that is not full. ``parts`` divides the items.
    """
    rows, items = weights.shape
    most = items // parts
    chosen = np.zeros((rows, items), dtype=np.int64)
    load = np.zeros((rows, parts))
    count = np.zeros((rows, parts), dtype=np.int64)
    every = np.arange(rows)
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        part = np.where(count < most, load, np.inf).argmin(axis=1)
        chosen[every, item] = part
        load[every, part] += weights[every, item]
        count[every, part] += 1
    return chosen


def _hierarchical(loads: Floats, *, gpus: int, nodes: int, groups: int, redundant: int) -> Ints:
    layers, experts = loads.shape
    of_node = _groups_to_nodes(loads, nodes, groups)  # [layers * nodes, experts of a node]
    rows = np.repeat(np.arange(layers), nodes)[:, None]
    local = loads[rows, of_node]
    slots = (experts + redundant) // nodes
    copies = replicate(local, slots, gpus // nodes)
    # Which of the node's experts each of its copies is: [layers * nodes, slots of a node].
    which = np.stack([np.repeat(np.arange(len(row)), row) for row in copies])
    weights = np.take_along_axis(local / copies, which, axis=1)
    gpu = pack(weights, gpus // nodes)
    order = np.argsort(gpu, axis=1, kind="stable")
    placed: Ints = np.take_along_axis(of_node, np.take_along_axis(which, order, axis=1), axis=1)
    return placed.reshape(layers, (experts + redundant))


def _groups_to_nodes(loads: Floats, nodes: int, groups: int) -> Ints:
    """The experts of each node, a node a row: [layers * nodes, experts / nodes]."""
    layers, experts = loads.shape
    size = experts // groups
    node = pack(loads.reshape(layers, groups, size).sum(axis=2), nodes)
    order = np.argsort(node, axis=1, kind="stable")  # groups, the first node's first
    members: Ints = order[:, :, None] * size + np.arange(size)
    return members.reshape(layers * nodes, experts // nodes)


def _in_order(experts: int, *, gpus: int, redundant: int, one_node: bool) -> list[Ints]:
    """Plain orders of the same slots, which keep what the policy promises."""
    found = []
    if experts % gpus == 0:
        # Each GPU's own experts and again the first of them: just as linear placement without redundancy.
        own = np.arange(experts).reshape(gpus, -1)
        again = own[:, np.arange(redundant // gpus) % own.shape[1]]
        found.append(np.concatenate([own, again], axis=1).reshape(-1))
    if one_node:
        found.append(np.arange(experts + redundant) % experts)
    return found


def _table(loads: Any) -> Floats:
    try:
        table = np.asarray(loads, dtype=np.float64)
    except (TypeError, ValueError):
        raise LoadsError(
            "the loads are no table of numbers: give a list of layers, each a list of experts"
        ) from None
    if table.ndim != 2 or 0 in table.shape:
        raise LoadsError(f"the loads have the shape {list(table.shape)}; wanted are [layers, experts]")
    if not np.isfinite(table).all() or (table < 0).any():
        layer, expert = (int(i) for i in np.argwhere(~np.isfinite(table) | (table < 0))[0])
        raise LoadsError(
            f"the load of layer {layer}, expert {expert} is {table[layer, expert]}; 0 is the least"
        )
    return table


def _checked(loads: Any, *, gpus: int, nodes: int, groups: int, redundant: int) -> Floats:
    table = _table(loads)
    experts = table.shape[1]
    for name, value in (("GPUs", gpus), ("nodes", nodes), ("expert groups", groups)):
        if value < 1:
            raise LoadsError(f"{value} {name} cannot be; the least is 1")
    if redundant < 0:
        raise LoadsError(f"{redundant} redundant slots cannot be; the least is 0")
    if gpus % nodes:
        raise LoadsError(f"{gpus} GPUs cannot stand equally in {nodes} nodes")
    if experts % groups:
        raise LoadsError(f"{experts} experts do not make {groups} equal groups")
    slots = experts + redundant
    if slots % gpus:
        less, more = slots // gpus * gpus - experts, -(-slots // gpus) * gpus - experts
        fitting = f"{less} or {more}" if less >= 0 else str(more)
        raise LoadsError(
            f"{experts} experts and {redundant} redundant ones are {slots} slots, which {gpus} GPUs cannot "
            f"share equally. Take {fitting} redundant ones."
        )
    if redundant > (most := experts * (gpus // nodes - 1)):
        raise LoadsError(
            f"{redundant} redundant slots are more than a copy of each expert on each GPU (of its node) "
            f"needs; take at most {most}"
        )
    return table
