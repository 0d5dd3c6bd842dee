"""What a plan says: placements and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.planner.asleep import Sleep
from engine.planner.hardware import Node
from engine.planner.layout import Layout, Want
from engine.planner.memory import Footprint
from engine.planner.needs import ModelNeeds


@dataclass(frozen=True)
class Placement:
    """One replica: where it stands, how it is laid out, what it takes of each GPU, and why so."""

    id: str
    want: Want
    needs: ModelNeeds
    layout: Layout
    #: Per GPU.
    footprint: Footprint
    #: (node, GPU numbers), the first node being the one that answers requests.
    places: tuple[tuple[Node, tuple[int, ...]], ...]
    context: int
    #: Sentences for a person.
    why: tuple[str, ...]
    #: What it takes of each GPU and of the host while asleep; None = resident.
    sleep: Sleep | None = None

    @property
    def gpus(self) -> int:
        return sum(len(gpus) for _, gpus in self.places)


@dataclass(frozen=True)
class Refusal:
    """A replica that has no place."""

    id: str
    model: str
    #: The filter or step that refused it.
    step: str
    reason: str
    #: The smallest change that would make it fit; '' = none is known.
    change: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that was decided."""

    nodes: tuple[Node, ...]
    placements: tuple[Placement, ...]
    refusals: tuple[Refusal, ...]
    #: Bytes of each node's GPUs that nobody takes, of what replicas may take.
    free: tuple[tuple[int, ...], ...]
    #: Bytes of each node's host memory that no sleeping weights take, of what they may take.
    host_free: tuple[int, ...] = ()
    #: Who owns which GPU of which node; those that are not named are nobody's.
    homes: Mapping[tuple[int, int], str] = field(default_factory=dict)
