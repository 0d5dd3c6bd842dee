"""What passes between decisions and effects: actions to be carried out, events that have happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.routes import ReplicaState
from engine.scheduler.units import ProcessRef, Progress


@dataclass(frozen=True)
class Launch:
    """Start the unit's process; answered at once by :class:`Launched` or :class:`LaunchFailed`."""

    unit: str


@dataclass(frozen=True)
class Check:
    """Ask for the unit's health; answered by :class:`Healthy` or :class:`Missed`."""

    unit: str


@dataclass(frozen=True)
class WarmUp:
    """Send a real request; answered by :class:`Warmed` or :class:`WarmFailed`."""

    unit: str


@dataclass(frozen=True)
class Terminate:
    """SIGTERM to the leader, which drains and ends its children; :class:`Sweep` follows at the deadline."""

    unit: str
    grace_s: float
    state: ReplicaState
    then: Literal["backoff", "planned", "stopped"]
    reason: str


@dataclass(frozen=True)
class Sweep:
    """End all that lives of the unit's group, and say :class:`Gone` only when nothing does."""

    unit: str
    #: False: give the children of an ended leader a moment to end by themselves.
    at_once: bool


Action = Launch | Check | WarmUp | Terminate | Sweep


@dataclass(frozen=True)
class Launched:
    unit: str
    process: ProcessRef


@dataclass(frozen=True)
class LaunchFailed:
    unit: str
    reason: str


@dataclass(frozen=True)
class Exited:
    """The group's leader has ended.

    ``code`` is its exit status, negative for a signal, None when unknown (it was not our child). ``reason``
    says it for a person; ``result`` is a preparation's outcome.
    """

    unit: str
    process: ProcessRef
    code: int | None
    reason: str
    #: What its log or its outcome adds to the reason: for the operator's eyes, not for API clients.
    detail: str = ""
    log_tail: tuple[str, ...] = ()
    result: Path | None = None


@dataclass(frozen=True)
class Gone:
    """Nothing of the group lives."""

    unit: str
    process: ProcessRef


@dataclass(frozen=True)
class Healthy:
    unit: str
    process: ProcessRef


@dataclass(frozen=True)
class Missed:
    """A health check had no good answer."""

    unit: str
    process: ProcessRef
    reason: str


@dataclass(frozen=True)
class Warmed:
    unit: str
    process: ProcessRef


@dataclass(frozen=True)
class WarmFailed:
    unit: str
    process: ProcessRef
    reason: str


@dataclass(frozen=True)
class Progressed:
    unit: str
    progress: Progress


@dataclass(frozen=True)
class Measured:
    unit: str
    process: ProcessRef
    memory_bytes: int


@dataclass(frozen=True)
class StopAsked:
    """Stop everything; asked again, it can only become more urgent."""

    drain: bool = True
    kill: bool = False


Event = (
    Launched
    | LaunchFailed
    | Exited
    | Gone
    | Healthy
    | Missed
    | Warmed
    | WarmFailed
    | Progressed
    | Measured
    | StopAsked
)
