"""The route table: made from the world, numbered, watched by gateways, mirrored to a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import ValidationError

from engine.routes import ModelRoute, Replica, RouteTable
from engine.scheduler.expert_balance import worst_of
from engine.scheduler.outlook import model_outlook
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.statefile import write_atomically
from engine.scheduler.status import replicas_by_model
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


def _row(world: World, units: list[Unit], now: float, wall: float, created: int) -> ModelRoute:
    seen = model_outlook(world, units, now)
    ready = [unit for unit in units if unit.state == "ready" and isinstance(unit.plan, RunnerPlan)]
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
        tier=plan.standing.tier,
        wake_wait_s=world.policy.wake_wait_s if plan.standing.tier == "standby" else None,
        most_waiting=world.policy.most_waiting,
        state=seen.state,
        reason=seen.reason,
        eta_s=None if seen.eta_s is None else round(seen.eta_s, 1),
        at=round(wall, 3),
        replicas=[Replica(id=unit.id, socket=str(_socket(unit))) for unit in ready],
        expert_balance=worst_of(unit.expert_balance for unit in ready),
    )


def _socket(unit: Unit) -> Path:
    assert isinstance(unit.plan, RunnerPlan)
    return unit.plan.spec.socket


def is_news(old: list[ModelRoute], new: list[ModelRoute]) -> bool:
    """Whether gateways should hear of it: anything but the plain passing of time."""
    if len(old) != len(new):
        return True
    timeless = {"at": 0.0, "eta_s": None}
    for before, after in zip(old, new, strict=True):
        if before.model_copy(update=timeless) != after.model_copy(update=timeless):
            return True
        if (before.eta_s is None) != (after.eta_s is None):
            return True
        moved = (after.at + (after.eta_s or 0.0)) - (before.at + (before.eta_s or 0.0))
        if after.state != "ready" and abs(moved) > _ETA_NEWS_S:
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
