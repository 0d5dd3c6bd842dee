"""What the scheduler says of itself: ``GET /status`` and the live table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, Field

from engine import __version__
from engine.routes import ExpertBalance, ReplicaState
from engine.runners.spec import Category, EngineKind
from engine.scheduler.expert_balance import worst_of
from engine.scheduler.memory import held
from engine.scheduler.outlook import Outlook, model_outlook, outlook
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.units import Unit, World


class SchedulerStatus(BaseModel):
    pid: int
    started: float = Field(description="Unix time.")
    version: str = __version__


class ProgressStatus(BaseModel):
    """How far a preparation has come."""

    stage: str
    done: float
    total: float | None = Field(default=None, description="None = unknown.")
    unit: str = Field(default="", description="'bytes' or 'share'.")
    message: str = ""


class UnitStatus(BaseModel):
    """One process group: a replica of a model, or a gateway worker."""

    id: str
    state: ReplicaState
    reason: str = Field(default="", description="Why it is not ready, for a person.")
    since_s: float = Field(description="Seconds in this state.")
    eta_s: float | None = Field(default=None, description="Roughly the seconds until ready; None = unknown.")
    pid: int | None = None
    restarts: int = 0
    memory_bytes: int | None = Field(default=None, description="PSS of the group, measured now and then.")
    device: str = ""
    owner: str | None = Field(default=None, description="The tenant that owns it; None = shared.")
    log_tail: list[str] = Field(default=[], description="Last log lines of a process that failed.")


class ModelStatus(BaseModel):
    """One served model; state, reason and times are those of the replica that is furthest along.

    A tenant's own replicas of a model have a row of their own, with `owner`, behind that of the shared ones.
    """

    id: str
    owner: str | None = Field(default=None, description="The tenant whose replicas these are; None = shared.")
    spill_over: bool = Field(
        default=False, description="Whether the owner's requests go to shared replicas where these cannot."
    )
    category: Category
    engine: EngineKind
    tier: Literal["resident", "standby"] = "resident"
    pinned: bool = False
    priority: int = 0
    device: str
    state: ReplicaState
    reason: str = ""
    since_s: float
    eta_s: float | None = None
    progress: ProgressStatus | None = None
    restarts: int = 0
    pid: int | None = None
    memory_bytes: int | None = None
    expert_balance: ExpertBalance | None = Field(
        default=None, description="How evenly its experts are loaded, of the least even replica."
    )
    log_tail: list[str] = []
    replicas: list[UnitStatus] = []


class DeviceStatus(BaseModel):
    """The memory of one device, as planned."""

    device: str
    room_bytes: int = Field(description="For all runners together.")
    held_bytes: int = Field(
        description="By residents, whether they run or not, and by standby models as they are."
    )


class Status(BaseModel):
    scheduler: SchedulerStatus
    profile: str
    base_url: str = Field(description="For OpenAI clients, with /v1.")
    stopping: bool = False
    ready: bool = Field(description="Every model and gateway worker is ready, or (standby) asleep.")
    asleep: int = Field(default=0, description="Models that sleep.")
    devices: list[DeviceStatus] = []
    gateways: list[UnitStatus] = []
    models: list[ModelStatus] = []


def make_status(
    world: World, now: float, *, scheduler: SchedulerStatus, profile: str, base_url: str
) -> Status:
    """The status of a world at ``now`` (the loop's clock)."""
    gateways = [_unit(world, unit, now) for unit in world.of_kind("gateway") if unit.wanted]
    models = [
        _model(world, units, now)
        for of_model in replicas_by_model(world.units.values()).values()
        for units in replicas_by_owner(of_model).values()
    ]
    units = [unit for unit in (*world.of_kind("gateway"), *world.of_kind("runner")) if unit.wanted]
    holds = held(world)
    return Status(
        scheduler=scheduler,
        profile=profile,
        base_url=base_url,
        stopping=world.stop is not None,
        ready=world.stop is None and all(map(_is_well, units)),
        asleep=sum(model.state == "asleep" for model in models),
        devices=[
            DeviceStatus(device=device, room_bytes=room, held_bytes=holds[device])
            for device, room in world.room.items()
        ],
        gateways=gateways,
        models=models,
    )


def _is_well(unit: Unit) -> bool:
    """Whether it is ready, or a loaded standby replica that sleeps or changes between the two."""
    if unit.state == "ready":
        return True
    for_another = unit.withdrawal is not None and unit.withdrawal.room_for != ""
    loaded = unit.state in ("asleep", "waking") or for_another
    return unit.standby and loaded and not unit.unsettled and not unit.ending


def replicas_by_model(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """The wanted runners, grouped by model in the plan's order."""
    grouped: dict[str, list[Unit]] = {}
    for unit in units:
        if isinstance(unit.plan, RunnerPlan):
            grouped.setdefault(unit.plan.model, []).append(unit)
    return grouped


def replicas_by_owner(units: Iterable[Unit]) -> dict[str | None, list[Unit]]:
    """A model's units, the shared ones (None) first, then each owner's."""
    grouped: dict[str | None, list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: unit.owner is not None):
        grouped.setdefault(unit.owner, []).append(unit)
    return grouped


def _unit(world: World, unit: Unit, now: float) -> UnitStatus:
    seen = outlook(world, unit, now)
    return UnitStatus(
        id=unit.id,
        state=seen.state,
        reason=seen.full_reason,
        since_s=round(now - seen.since, 1),
        eta_s=_rounded(seen.eta_s),
        pid=unit.process.pid if unit.process else None,
        restarts=unit.restarts,
        memory_bytes=unit.memory_bytes,
        device=unit.device,
        owner=unit.owner,
        log_tail=list(seen.log_tail),
    )


def _model(world: World, units: list[Unit], now: float) -> ModelStatus:
    seen = model_outlook(world, units, now)
    plan = units[0].plan
    assert isinstance(plan, RunnerPlan)
    replicas = [_unit(world, unit, now) for unit in units]
    sizes = [replica.memory_bytes for replica in replicas if replica.memory_bytes is not None]
    return ModelStatus(
        id=plan.model,
        owner=plan.owner,
        spill_over=plan.standing.spill_over,
        category=plan.entry.category,
        engine=plan.entry.engine,
        tier=plan.standing.tier,
        pinned=plan.standing.pinned,
        priority=plan.standing.priority,
        device=", ".join(dict.fromkeys(replica.device for replica in replicas)),
        state=seen.state,
        reason=seen.full_reason,
        since_s=round(now - seen.since, 1),
        eta_s=_rounded(seen.eta_s),
        progress=_progress(seen),
        restarts=sum(replica.restarts for replica in replicas),
        pid=next((replica.pid for replica in replicas if replica.pid), None),
        memory_bytes=sum(sizes) if sizes else None,
        expert_balance=worst_of(unit.expert_balance for unit in units),
        log_tail=list(seen.log_tail),
        replicas=replicas,
    )


def _progress(seen: Outlook) -> ProgressStatus | None:
    if seen.progress is None:
        return None
    p = seen.progress
    return ProgressStatus(stage=p.stage, done=p.done, total=p.total, unit=p.unit, message=p.message)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
