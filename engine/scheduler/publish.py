"""The route table: made from the world, numbered, watched by gateways, mirrored to a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import ValidationError

from engine.routes import DedicatedRoute, ModelRoute, Replica, RouteTable
from engine.scheduler.expert_balance import worst_of
from engine.scheduler.outlook import model_outlook
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.statefile import write_atomically
from engine.scheduler.status import replicas_by_model, replicas_by_owner
from engine.scheduler.units import Unit, World

#: An estimate that moved by less than this (seconds) is no news.
_ETA_NEWS_S = 5.0


def make_routes(world: World, now: float, wall: float, created: int) -> list[ModelRoute]:
    """One row a model, in the plan's order; only ready replicas are listed.

    Args:
        now: the loop's clock, seconds.
        wall: Unix time of the same moment.
        created: Unix time that models are said to exist since.
    """
    return [
        _row(world, units, now, wall, created) for units in replicas_by_model(world.units.values()).values()
    ]


def _row(world: World, every: list[Unit], now: float, wall: float, created: int) -> ModelRoute:
    by_owner = replicas_by_owner(every)
    shared = by_owner.pop(None, [])
    # Where a model is served to its owners alone, the row tells of theirs.
    units = shared or every
    seen = model_outlook(world, units, now)
    ready = [unit for unit in units if _is_ready(unit)]
    # While one with changed settings loads, what is said of the model is true of the one that answers.
    plan = (ready or units)[0].plan
    assert isinstance(plan, RunnerPlan)
    entry, spec = plan.entry, plan.spec
    return ModelRoute(
        id=entry.id,
        aliases=entry.aliases,
        category=entry.category,
        owned_by=entry.owned_by,
        created=created,
        context_length=spec.context_length,
        capabilities=spec.capabilities,
        fim_template=entry.fim.template if entry.fim else None,
        fim_stop=entry.fim.stop if entry.fim else [],
        # Our own runners bound their queues themselves; vLLM takes whatever comes.
        max_in_flight=spec.max_batch + spec.max_queue if entry.engine == "vllm" else None,
        max_batch=spec.max_batch,
        tier=plan.standing.tier,
        wake_wait_s=world.policy.wake_wait_s if plan.standing.tier == "standby" else None,
        most_waiting=world.policy.most_waiting,
        state=seen.state,
        reason=seen.reason,
        eta_s=None if seen.eta_s is None else round(seen.eta_s, 1),
        at=round(wall, 3),
        shared=bool(shared),
        dedicated=[
            _dedicated(world, owner, own, now)
            for owner, own in by_owner.items()
            # Once the last of them goes, its owner is one of the others.
            if owner and any(_is_ready(unit) or not unit.leaving for unit in own)
        ],
        replicas=[
            Replica(id=unit.id, socket=str(_socket(unit)), owner=unit.owner)
            for unit in every
            if _is_ready(unit)
        ],
        expert_balance=worst_of(unit.expert_balance for unit in every if _is_ready(unit)),
    )


def _dedicated(world: World, owner: str, units: list[Unit], now: float) -> DedicatedRoute:
    seen = model_outlook(world, units, now)
    # Those that leave stand last: what is configured now is the first one's to say.
    plan = units[0].plan
    assert isinstance(plan, RunnerPlan)
    return DedicatedRoute(
        owner=owner,
        spill_over=plan.standing.spill_over,
        state=seen.state,
        reason=seen.reason,
        eta_s=None if seen.eta_s is None else round(seen.eta_s, 1),
    )


def _is_ready(unit: Unit) -> bool:
    return unit.state == "ready" and isinstance(unit.plan, RunnerPlan)


def _socket(unit: Unit) -> Path:
    assert isinstance(unit.plan, RunnerPlan)
    return unit.plan.spec.socket


def is_news(old: list[ModelRoute], new: list[ModelRoute]) -> bool:
    """Whether gateways should hear of it: anything but the plain passing of time."""
    if len(old) != len(new):
        return True
    return any(
        _timeless(before) != _timeless(after) or _moved(before, after)
        for before, after in zip(old, new, strict=True)
    )


def _timeless(row: ModelRoute) -> ModelRoute:
    own = [each.model_copy(update={"eta_s": None}) for each in row.dedicated]
    return row.model_copy(update={"at": 0.0, "eta_s": None, "dedicated": own})


def _moved(before: ModelRoute, after: ModelRoute) -> bool:
    """Whether one of the estimates is another than the passing of time made of it."""
    olds: list[ModelRoute | DedicatedRoute] = [before, *before.dedicated]
    news: list[ModelRoute | DedicatedRoute] = [after, *after.dedicated]
    for old, new in zip(olds, news, strict=True):
        if (old.eta_s is None) != (new.eta_s is None):
            return True
        moved = (after.at + (new.eta_s or 0.0)) - (before.at + (old.eta_s or 0.0))
        if new.state != "ready" and abs(moved) > _ETA_NEWS_S:
            return True
    return False


class RouteBoard:
    """The current table, for those who watch it."""

    def __init__(self, mirror: Path) -> None:
        """Goes on from the mirror's version, so that a gateway that knows it sees the next table as new."""
        self._mirror = mirror
        self.table = RouteTable(version=_last_version(mirror))
        self._changed = asyncio.Event()

    def publish(self, models: list[ModelRoute]) -> bool:
        """Takes new rows; False when they are no news."""
        if self.table.models and not is_news(self.table.models, models):
            return False
        self.table = RouteTable(version=self.table.version + 1, models=models)
        write_atomically(self._mirror, self.table.model_dump_json())
        self._changed.set()
        self._changed = asyncio.Event()
        return True

    async def after(self, version: int, wait_s: float) -> RouteTable:
        """The table once its version differs from ``version``, or as it is after ``wait_s`` seconds."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while self.table.version == version:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                break
        return self.table


def _last_version(mirror: Path) -> int:
    try:
        return RouteTable.model_validate_json(mirror.read_bytes()).version
    except (OSError, ValidationError):
        return 0
