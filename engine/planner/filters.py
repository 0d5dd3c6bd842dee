"""The first step: which layouts a model may have on a kind of GPU, and why the others are out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from engine.planner import rules
from engine.planner.asleep import sleep_of
from engine.planner.hardware import Node
from engine.planner.layout import Layout, Policy, Want
from engine.planner.memory import GIB, capacity, context_of, footprint
from engine.planner.needs import ModelNeeds


@dataclass(frozen=True)
class Case:
    """One question to a filter: this model, so laid out, on such nodes."""

    needs: ModelNeeds
    want: Want
    layout: Layout
    node: Node
    policy: Policy


class Filter(Protocol):
    """One named reason to leave a layout out."""

    name: ClassVar[str]

    def reason(self, case: Case) -> str | None:
        """Why the layout is out; None = it passes."""


class KnownFigures:
    """Nothing is placed by guess."""

    name: ClassVar[str] = "known figures"

    def reason(self, case: Case) -> str | None:
        if case.needs.engine == "vllm" and case.want.memory_bytes is not None:
            return None  # whoever fixed the memory has reckoned
        missing = case.needs.unknown()
        return f"unknown: {', '.join(missing)}" if missing else None


class Context:
    """Not more context than the model was made for."""

    name: ClassVar[str] = "context"

    def reason(self, case: Case) -> str | None:
        most, asked = case.needs.context, case.want.context
        if case.needs.engine == "vllm" and asked is not None and most is not None and asked > most:
            return f"{asked} tokens asked; the model's context is {most}"
        return None


class Engine:
    """Only vLLM spreads a replica over several GPUs, and only experts are spread by EP."""

    name: ClassVar[str] = "engine"

    def reason(self, case: Case) -> str | None:
        layout = case.layout
        if layout.gpus > 1 and case.needs.engine != "vllm":
            return f"{case.needs.engine} runs a replica on one GPU"
        if layout.dp > 1 and not (layout.ep and case.needs.is_moe):
            return "DP inside one replica is for expert parallelism; a dense model takes more replicas"
        return None


class Capability:
    """The GPU's generation can run it."""

    name: ClassVar[str] = "capability"

    def reason(self, case: Case) -> str | None:
        return rules.capability_reason(case.needs, case.node.kind, case.layout.kv_dtype)


class Split:
    """Heads and blocks divide evenly."""

    name: ClassVar[str] = "split"

    def reason(self, case: Case) -> str | None:
        if case.want.tensor_parallel and case.needs.attention_heads is None:
            return None  # whoever fixed it knows the heads
        # With EP an expert stays whole, so only its attention is split.
        return rules.split_reason(case.needs, case.layout.tp)


class Reach:
    """Tensor parallelism stays in a node; experts cross nodes over RDMA only."""

    name: ClassVar[str] = "reach"

    def reason(self, case: Case) -> str | None:
        layout, node = case.layout, case.node
        if layout.tp > node.gpus:
            return f"TP{layout.tp} would leave its node of {node.gpus} GPUs"
        if layout.ep and layout.tp * layout.dp > node.gpus and not node.rdma:
            return "experts over several nodes need RDMA between them"
        return None


class Balancing:
    """EPLB only where vLLM does it."""

    name: ClassVar[str] = "EPLB"

    def reason(self, case: Case) -> str | None:
        return rules.eplb_reason(case.needs, case.layout.ep_size) if case.layout.eplb else None


class Memory:
    """It fits GPUs that are otherwise empty."""

    name: ClassVar[str] = "memory"

    def reason(self, case: Case) -> str | None:
        room = capacity(case.node.kind, case.policy.utilisation)
        need = footprint(case.needs, case.want, case.layout, case.node.kind, case.policy)
        if need.total <= room:
            return None
        terms = " + ".join(f"{term.name} {term.bytes / GIB:.1f}" for term in need.terms)
        context = context_of(case.needs, case.want, case.policy)
        of = f" for {case.want.concurrency} x {context} tokens" if need.token_bytes else ""
        return (
            f"{case.layout.name()} needs {need.total / GIB:.1f} GiB of each {case.node.kind.name}{of} "
            f"({terms}); "
            f"{room / GIB:.1f} GiB of {case.node.kind.memory_bytes / GIB:.1f} are usable"
        )


class HostMemory:
    """Asleep, its weights fit the host's memory."""

    name: ClassVar[str] = "host memory"

    def reason(self, case: Case) -> str | None:
        if case.want.tier != "standby":
            return None
        need = footprint(case.needs, case.want, case.layout, case.node.kind, case.policy)
        weights = sleep_of(case.needs, case.layout, need).host * min(case.layout.gpus, case.node.gpus)
        if weights <= case.node.host_bytes:
            return None
        return (
            f"asleep, its weights take {weights / GIB:.1f} GiB of the host's memory; "
            f"{case.node.host_bytes / GIB:.1f} GiB of each node are for that"
        )


#: In this order: the first reason is the one told.
FILTERS: tuple[Filter, ...] = (
    KnownFigures(),
    Context(),
    Engine(),
    Capability(),
    Split(),
    Reach(),
    Balancing(),
    Memory(),
    HostMemory(),
)


def first_reason(case: Case) -> tuple[str, str] | None:
    """The first filter that is against it, and its reason; None when all pass."""
    for each in FILTERS:
        reason = each.reason(case)
        if reason is not None:
            return each.name, reason
    return None
