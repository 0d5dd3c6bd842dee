"""What passes between decisions and effects: actions to be carried out, events that have happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.routes import ExpertBalance, ReplicaState
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.units import ModelUsage, ProcessRef, Progress, ReplicaUsage


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


@dataclass(frozen=True)
class Withdraw:
    """Take a ready replica out of the route table, to make room for the unit ``room_for``. No effect."""

    unit: str
    room_for: str


@dataclass(frozen=True)
class Restore:
    """Put a withdrawn replica back into the route table. No effect.

    ``asked`` = its own model is asked for again; ``busy`` = it was in use after all.
    """

    unit: str
    asked: bool = False
    busy: bool = False


@dataclass(frozen=True)
class Sleep:
    """Put a withdrawn replica to sleep; answered by :class:`Slept` or :class:`SleepFailed`."""

    unit: str


@dataclass(frozen=True)
class Wake:
    """Wake a sleeper and send it a real request; answered by :class:`Woken` or :class:`WakeFailed`."""

    unit: str


@dataclass(frozen=True)
class Settle:
    """Ask one taken over half-way whether it sleeps, and make it wholly so: answered as Sleep or Wake are."""

    unit: str


@dataclass(frozen=True)
class Depart:
    """Take a replica that leaves out of the route table for good. No effect."""

    unit: str
    reason: str


@dataclass(frozen=True)
class Add:
    """Have one more replica of a model: a unit that is yet to start. No effect."""

    unit: str
    plan: RunnerPlan
    reason: str


@dataclass(frozen=True)
class Drop:
    """Have one replica fewer: the unit leaves. No effect."""

    unit: str
    reason: str


Action = (
    Launch
    | Check
    | WarmUp
    | Terminate
    | Sweep
    | Withdraw
    | Restore
    | Sleep
    | Wake
    | Settle
    | Depart
    | Add
    | Drop
)


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
class Slept:
    unit: str
    process: ProcessRef


@dataclass(frozen=True)
class SleepFailed:
    """``busy``: it has a request in hand and goes on as before."""

    unit: str
    process: ProcessRef
    reason: str
    busy: bool = False


@dataclass(frozen=True)
class Woken:
    """It is awake and has answered a real request."""

    unit: str
    process: ProcessRef


@dataclass(frozen=True)
class WakeFailed:
    unit: str
    process: ProcessRef
    reason: str


@dataclass(frozen=True)
class WakeAsked:
    """A held connection asks for a model; it does until :class:`WakeLeft`."""

    model: str
    waiter: int


@dataclass(frozen=True)
class WakeLeft:
    """The held connection has ended, answered or not."""

    model: str
    waiter: int


@dataclass(frozen=True)
class UsageReported:
    """A gateway worker says which route table it uses and what it has in hand."""

    worker: int
    version: int
    replicas: Mapping[str, ReplicaUsage]
    models: Mapping[str, ModelUsage]


@dataclass(frozen=True)
class Progressed:
    unit: str
    progress: Progress


@dataclass(frozen=True)
class Measured:
    unit: str
    process: ProcessRef
    memory_bytes: int
    expert_balance: ExpertBalance | None = None


@dataclass(frozen=True)
class StopAsked:
    """Stop everything; asked again, it can only become more urgent."""

    drain: bool = True
    kill: bool = False


@dataclass(frozen=True)
class Renewed:
    """Another plan was taken over: look anew."""


Event = (
    Renewed
    | Launched
    | LaunchFailed
    | Exited
    | Gone
    | Healthy
    | Missed
    | Warmed
    | WarmFailed
    | Slept
    | SleepFailed
    | Woken
    | WakeFailed
    | WakeAsked
    | WakeLeft
    | UsageReported
    | Progressed
    | Measured
    | StopAsked
)
