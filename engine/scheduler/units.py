"""The units that the scheduler looks after, and the world they make up. Data only.

A *unit* is one process group with a purpose: a runner (one replica of a model), a gateway worker, or the
preparation of a model's weights. The run loop of :mod:`engine.scheduler.supervisor` alone owns a
:class:`World`; :mod:`engine.scheduler.reconcile` reads it and :mod:`engine.scheduler.events` changes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.routes import ExpertBalance, ReplicaState
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.trend import Rules, Trend
from models.entry import ModelEntry

UnitKind = Literal["runner", "gateway", "preparation"]


@dataclass(frozen=True)
class ProcessRef:
    """A process that cannot be mistaken for another one that got its number later.

    ``started`` is the kernel's start time in clock ticks since boot (field 22 of ``/proc/PID/stat``);
    ``token`` stands in the environment of the process and of all that it starts.
    """

    pid: int
    started: int
    token: str


@dataclass(frozen=True)
class GatewayPlan:
    """One gateway worker."""

    id: str
    fingerprint: str
    settings: Path
    index: int
    alone: bool = True


@dataclass(frozen=True)
class PreparationPlan:
    """The weights that runners with one weights key wait for."""

    id: str
    fingerprint: str
    entry: ModelEntry
    serving_id: str


UnitPlan = RunnerPlan | GatewayPlan | PreparationPlan


@dataclass
class Ending:
    """A process group that is on its way out."""

    deadline: float
    #: What the unit becomes once nothing of the group lives.
    then: Literal["backoff", "planned", "stopped", "ready"]
    #: The sweep of the whole group has been asked for.
    swept: bool = False
    #: The leader has ended; only what it left behind may still live.
    exited: bool = False


@dataclass(frozen=True)
class Placed:
    """What a living runner holds of each of its devices, by the plan that it was started with; bytes."""

    devices: tuple[str, ...]
    awake_bytes: int = 0
    asleep_bytes: int = 0
    #: Host memory of its weights while asleep.
    host_bytes: int = 0


@dataclass(frozen=True)
class Withdrawal:
    """A ready replica has left the route table, to be put to sleep once nobody uses it any more."""

    since: float
    #: The unit that needs the room; '' = nobody: it falls asleep since nobody asked for it.
    room_for: str = ""
    #: The route table's version at that moment: only a later one is without the replica.
    version: int = 0


@dataclass(frozen=True)
class Leaving:
    """The plan asks no more for a unit that lives: it goes once all ``successors`` are ready."""

    reason: str
    #: () = it goes at once.
    successors: tuple[str, ...] = ()


@dataclass
class Progress:
    """How far a preparation has come; ``total`` None = unknown."""

    stage: str
    done: float
    total: float | None
    unit: str = ""
    message: str = ""


@dataclass
class Unit:
    """One process group with a purpose: as wanted, and as last seen. Times are the loop's clock, seconds."""

    id: str
    kind: UnitKind
    plan: UnitPlan | None
    state: ReplicaState = "planned"
    since: float = 0.0
    reason: str = ""
    #: More on the reason from the log: for the operator's eyes, not for API clients.
    detail: str = ""
    log_tail: tuple[str, ...] = ()
    process: ProcessRef | None = None
    #: Fingerprint of the plan that the living process was started with.
    running: str = ""
    ending: Ending | None = None
    started_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    check_due: float = 0.0
    checking: bool = False
    warming_asked: bool = False
    missed: int = 0
    #: Why the living process must go, once something was found wrong with it.
    fault: str = ""
    #: The process was taken over from another scheduler: how long its start took is not known.
    adopted: bool = False
    launches: int = 0
    #: Why the process before this one ended, where that was a failure.
    after: str = ""
    #: Device of a unit that no plan places any more.
    left_on: str = ""
    memory_bytes: int | None = None
    #: Of a ready mixture of experts that tells it.
    expert_balance: ExpertBalance | None = None
    #: A runner's memory, for as long as its process lives.
    placed: Placed | None = None
    #: Whether it holds its memory as one awake does: from its launch or its wake on until it is asleep.
    awake: bool = False
    #: When it was ready last for a request that asked for it.
    awake_since: float = 0.0
    #: The route table's version at that moment: a later one names it as ready.
    awake_version: int = 0
    withdrawal: Withdrawal | None = None
    #: A call that puts it to sleep or wakes it is under way.
    moving: bool = False
    #: Taken over in the midst of falling asleep or waking: it must be asked which.
    unsettled: bool = False
    #: Not to be put to sleep before: it turned out busy.
    spared_until: float = 0.0
    #: It is to end and not to start again.
    leaving: Leaving | None = None
    #: It has left the route table for good, and ends once the gateway workers have taken note.
    farewell: Withdrawal | None = None
    #: Units whose memory (or place) it needs: it starts once they are gone.
    waits: frozenset[str] = frozenset()
    progress: Progress | None = None
    #: A preparation's outcome: the folder that the engine loads.
    result: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether the plan still asks for it; a unit left over from an older plan is not."""
        return self.plan is not None

    @property
    def starting(self) -> bool:
        """Whether its process is loading now, so that it takes one of its device's start places."""
        return self.state == "starting" and self.ending is None

    @property
    def standby(self) -> bool:
        return isinstance(self.plan, RunnerPlan) and self.plan.standing.tier == "standby"

    @property
    def pinned(self) -> bool:
        return isinstance(self.plan, RunnerPlan) and self.plan.standing.pinned

    @property
    def priority(self) -> int:
        return self.plan.standing.priority if isinstance(self.plan, RunnerPlan) else 0

    @property
    def model(self) -> str:
        """Serving name of a wanted runner's model; '' for any other unit."""
        return self.plan.model if isinstance(self.plan, RunnerPlan) else ""

    @property
    def owner(self) -> str | None:
        """The tenant that owns it; None = shared."""
        return self.plan.owner if isinstance(self.plan, RunnerPlan) else None

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that its process stands on, or will stand on."""
        if self.placed:
            return self.placed.devices
        return self.plan.devices if isinstance(self.plan, RunnerPlan) else ()

    @property
    def restarts(self) -> int:
        """Starts after the first one."""
        return max(0, self.launches - 1)

    @property
    def device(self) -> str:
        return self.plan.device if isinstance(self.plan, RunnerPlan) else self.left_on

    @property
    def needs(self) -> str | None:
        """Id of the preparation that must have ended well before this unit starts."""
        return self.plan.preparation if isinstance(self.plan, RunnerPlan) else None

    def become(self, state: ReplicaState, now: float, reason: str = "") -> None:
        if state != self.state:
            self.since = now
        self.state = state
        self.reason = reason
        if state == "ready":
            self.detail = ""


@dataclass(frozen=True)
class Policy:
    """The numbers of ``[scheduler]`` that decisions use; seconds where not said otherwise."""

    start_timeout_s: float = 600.0
    health_interval_s: float = 2.0
    health_failures: int = 5
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    stop_timeout_s: float = 15.0
    drain_s: float = 30.0
    gateway_drain_s: float = 30.0
    concurrent_starts: int = 4
    #: Between two looks at a process that loads.
    start_check_s: float = 0.5
    #: The numbers of ``[tiers]``.
    wake_wait_s: float = 60.0
    most_waiting: int = 256
    wake_timeout_s: float = 120.0
    min_residence_s: float = 20.0
    #: A gateway worker that has not said within this that it took a route table is taken to be busy.
    acknowledge_s: float = 5.0
    #: Longest that a replica which left the table waits for its last requests before it goes back.
    quiet_s: float = 1.0
    #: One that turned out busy is left alone for so long.
    spare_s: float = 1.0


@dataclass
class Stop:
    """A stop that was asked for."""

    since: float
    drain: bool = True
    kill: bool = False


@dataclass
class Demand:
    """Requests that wait for a model: each held connection of a gateway worker, with the time it began."""

    waiters: dict[int, float] = field(default_factory=dict)

    @property
    def since(self) -> float:
        return min(self.waiters.values())


@dataclass(frozen=True)
class ReplicaUsage:
    """What one gateway worker has at a replica."""

    in_flight: int = 0
    #: Since a request last began or ended there, at the time of the report, seconds.
    idle_s: float = 0.0


@dataclass(frozen=True)
class ModelUsage:
    """What one gateway worker has for a model."""

    waiting: int = 0
    #: Mean wait for the first byte lately, seconds; None = nothing was sent.
    first_byte_s: float | None = None


@dataclass(frozen=True)
class Usage:
    """What one gateway worker last said of itself."""

    #: The route table that it has in use.
    version: int
    replicas: Mapping[str, ReplicaUsage]
    models: Mapping[str, ModelUsage]
    at: float


@dataclass
class World:
    """Everything that the run loop knows."""

    policy: Policy = field(default_factory=Policy)
    units: dict[str, Unit] = field(default_factory=dict)
    stop: Stop | None = None
    #: Seconds from start to ready that each model took last time, by model id.
    durations: dict[str, float] = field(default_factory=dict)
    #: Seconds that each standby model took to wake last time, by model id.
    wakes: dict[str, float] = field(default_factory=dict)
    #: Memory for runners of each device, bytes; a device that is not named is unbounded.
    room: Mapping[str, int] = field(default_factory=dict)
    #: Product and owner of each device, where they are known.
    kinds: Mapping[str, str] = field(default_factory=dict)
    #: Host memory for the weights of sleepers, bytes; None = unbounded.
    host_room: int | None = None
    #: Models with requests that wait for them, by model id.
    demands: dict[str, Demand] = field(default_factory=dict)
    #: Reports of gateway workers, by process number.
    usage: dict[int, Usage] = field(default_factory=dict)
    #: Version of the route table that was published last.
    published: int = 0
    #: The numbers of ``[scaling]``.
    scaling: Rules = field(default_factory=Rules)
    #: How load goes, by model id, where the number of replicas may follow it.
    trends: dict[str, Trend] = field(default_factory=dict)

    def of_kind(self, kind: UnitKind) -> Iterator[Unit]:
        return (unit for unit in self.units.values() if unit.kind == kind)

    @property
    def empty(self) -> bool:
        """No process of any unit lives."""
        return all(unit.process is None for unit in self.units.values())
