"""The second step: the layouts worth trying for a model on a kind of node, best first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engine.planner import rules
from engine.planner.asleep import Sleep, sleep_of
from engine.planner.filters import Case, first_reason
from engine.planner.hardware import Node
from engine.planner.layout import KvDtype, Layout, Policy, Want
from engine.planner.memory import Footprint, footprint
from engine.planner.needs import ModelNeeds

#: Most nodes that one replica spans.
MOST_NODES = 4
#: Never more than this times the fewest GPUs that hold it: what is won in room is lost in talk between GPUs.
WIDEST = 4
#: From so many expert-parallel ranks on, one overloaded expert holds up many GPUs: EPLB by itself.
EPLB_RANKS = 16


@dataclass(frozen=True)
class Option:
    """One way to stand: so many GPUs of ``nodes`` nodes of one kind, with so much memory on each."""

    layout: Layout
    footprint: Footprint
    nodes: int
    per_node: int
    #: Place in the order of preference, 0 = best.
    rank: int = 0
    #: What is left of it while asleep; None = resident, always awake.
    sleep: Sleep | None = None

    @property
    def total(self) -> int:
        return self.footprint.total * self.nodes * self.per_node


@dataclass(frozen=True)
class Choice:
    """What ``options`` found for one kind of node."""

    options: tuple[Option, ...]
    #: (filter, reason) of the layouts that came nearest; for the message when nothing is left.
    reasons: tuple[tuple[str, str], ...]


def options(needs: ModelNeeds, want: Want, node: Node, count: int, policy: Policy) -> Choice:
    """The layouts that pass all filters on nodes like this one, one for each number of GPUs, best first.

    Args:
        needs: the model.
        want: what is asked of it.
        node: one node of the kind.
        count: how many such nodes there are.
        policy: what may be done.
    """
    found: dict[int, Option] = {}
    reasons: dict[str, str] = {}
    nearest = math.inf
    for layout in layouts(needs, want, node, count, policy):
        refused = first_reason(Case(needs, want, layout, node, policy))
        if refused is not None:
            name, reason = refused
            if name == "memory":
                need = footprint(needs, want, layout, node.kind, policy)
                # DCP only makes the cache smaller, and is seldom what is missing.
                if layout.dcp == 1 and need.total < nearest:
                    nearest, reasons[name] = need.total, reason
            else:
                reasons[name] = reason
            if name in ("known figures", "context"):
                break
        elif layout.gpus not in found:
            per_node = min(layout.gpus, node.gpus)
            need = footprint(needs, want, layout, node.kind, policy)
            sleep = sleep_of(needs, layout, need) if want.tier == "standby" else None
            found[layout.gpus] = Option(layout, need, layout.gpus // per_node, per_node, sleep=sleep)
    fewest = min(found, default=0)
    ordered = [found[gpus] for gpus in sorted(found) if gpus <= WIDEST * fewest]
    return Choice(tuple(replace(o, rank=i) for i, o in enumerate(ordered)), tuple(reasons.items()))


def layouts(needs: ModelNeeds, want: Want, node: Node, count: int, policy: Policy) -> Iterator[Layout]:
    """Every layout to try, by number of GPUs, and for each number in the order of preference.

    TP stays inside a node and within the KV heads first; MLA models with experts take DP attention with EP
    (each rank then has a cache of its own, while TP would hold the same one on every rank); PP only crosses
    nodes, as does wide EP.
    """
    kv = _kv_dtype(needs, want, node)
    sizes = [want.tensor_parallel] if want.tensor_parallel else _sizes(node.gpus)
    for gpus in sizes:
        for layout in _inside(needs, gpus, policy, fixed=want.tensor_parallel is not None):
            yield from _finished(needs, want, layout, node, kv)
    if needs.engine == "vllm" and node.gpus >= 2 and not want.tensor_parallel:
        for nodes in range(2, min(count, MOST_NODES) + 1):
            for layout in _across(needs, node.gpus, nodes, policy):
                yield from _finished(needs, want, layout, node, kv)


def _sizes(gpus: int) -> Sequence[int]:
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= gpus]
    return sizes if gpus in sizes else [*sizes, gpus]


def _inside(needs: ModelNeeds, gpus: int, policy: Policy, *, fixed: bool) -> Iterator[Layout]:
    if gpus == 1:
        yield Layout()
        return
    tensor = [Layout(tp=gpus)]
    latent = needs.kv is not None and needs.kv.latent
    if fixed or not needs.is_moe or needs.engine != "vllm":
        yield from tensor
    elif latent:
        spread = [Layout(dp=gpus, ep=True)]
        # Recipes verify int4 experts under TP alone.
        first = policy.objective == "throughput" and needs.dtype != "int4"
        yield from (spread + tensor if first else tensor + spread)
    else:
        heads = needs.kv.heads if needs.kv else gpus
        # More ranks than KV heads would hold copies of the cache: rather DP attention with EP.
        yield from [Layout(tp=heads, dp=gpus // heads, ep=True)] if gpus > heads and gpus % heads == 0 else []
        yield from tensor
        yield Layout(tp=gpus, ep=True)
    if latent and not fixed:
        yield Layout(tp=gpus, dcp=gpus)


def _across(needs: ModelNeeds, gpus: int, nodes: int, policy: Policy) -> Iterator[Layout]:
    wide = [Layout(dp=gpus * nodes, ep=True)] if needs.is_moe and needs.kv and needs.kv.latent else []
    staged = [Layout(tp=gpus, pp=nodes)]
    first = policy.objective == "throughput" and needs.dtype != "int4"
    yield from (wide + staged if first else staged + wide)


def _finished(needs: ModelNeeds, want: Want, layout: Layout, node: Node, kv: KvDtype) -> Iterator[Layout]:
    """The layout with cache dtype, all-to-all backend and EPLB."""
    nodes = max(1, layout.gpus // node.gpus)
    backend = rules.all2all_backend(nodes, node.rdma) if layout.ep else ""
    balance = want.eplb
    if balance is None:
        wide = layout.ep_size >= EPLB_RANKS
        balance = wide and rules.eplb_reason(needs, layout.ep_size) is None
    # One copy a rank lets the busiest expert of a layer stand on two.
    copies = layout.ep_size - needs.experts % layout.ep_size if balance and layout.ep else 0
    yield replace(layout, kv_dtype=kv, all2all=backend, eplb=balance, redundant_experts=copies)


def _kv_dtype(needs: ModelNeeds, want: Want, node: Node) -> KvDtype:
    if want.kv_dtype != "auto":
        return want.kv_dtype
    default = needs.architecture in rules.FP8_CACHE_FIRST
    return "fp8" if default and rules.capability_reason(needs, node.kind, "fp8") is None else "bf16"
