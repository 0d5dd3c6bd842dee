"""Replicas between a model's fewest and most, by what the gateway workers report. Pure.

:mod:`engine.scheduler.trend` says when; here is for whom and where. One step at a time, and only in
memory that is free: nobody is put to sleep or moved for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.scheduler.idleness import workers
from engine.scheduler.memory import Ledger
from engine.scheduler.messages import Add, Drop
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.replan import free_name
from engine.scheduler.seats import Taken, candidates, elsewhere
from engine.scheduler.trend import Bounds, Load, Trend, due, observe
from engine.scheduler.units import ReplicaUsage, Unit, World

#: A report older than this says nothing any more, seconds; workers report at least every 5.
STALE_S = 15.0
_NOTHING = ReplicaUsage()


def scalable(world: World) -> dict[str, list[Unit]]:
    """The shared units of each model whose number of replicas may differ; what a tenant owns is as given."""
    found: dict[str, list[Unit]] = {}
    for unit in world.of_kind("runner"):
        if isinstance(unit.plan, RunnerPlan) and unit.plan.owner is None:
            found.setdefault(unit.model, []).append(unit)
    return {model: units for model, units in found.items() if _is_elastic(units)}


def _is_elastic(units: list[Unit]) -> bool:
    plan = units[0].plan
    assert isinstance(plan, RunnerPlan)
    standing = plan.standing
    # A standby model's replicas share the room that is left; how many are awake follows from who asks.
    return standing.tier == "resident" and standing.max_replicas > standing.min_replicas


def load_of(world: World, model: str, units: list[Unit], now: float) -> Load | None:
    """The load of a model; None = no living worker has said anything lately."""
    reports = [usage for _, usage in workers(world) if usage and now - usage.at <= STALE_S]
    if not reports:
        return None
    flight = sum(usage.replicas.get(unit.id, _NOTHING).in_flight for usage in reports for unit in units)
    ours = [usage.models[model] for usage in reports if model in usage.models]
    waits = [one.first_byte_s for one in ours if one.first_byte_s is not None]
    return Load(flight + sum(one.waiting for one in ours), max(waits, default=0.0))


def take_stock(world: World, now: float) -> None:
    """Brings every trend up to date; called when a worker has reported."""
    models = scalable(world)
    for model in set(world.trends) - set(models):
        del world.trends[model]
    for model, units in models.items():
        load = load_of(world, model, units, now)
        if load is None:
            world.trends.pop(model, None)
            continue
        ready = sum(unit.state == "ready" for unit in units)
        trend = world.trends.get(model, Trend())
        world.trends[model] = observe(trend, load, ready, bounds_of(units), world.scaling, now)


def bounds_of(units: list[Unit]) -> Bounds:
    plan = units[0].plan
    assert isinstance(plan, RunnerPlan)
    return Bounds(plan.standing.min_replicas, plan.standing.max_replicas, plan.spec.max_batch)


def scale(world: World, now: float) -> Iterator[Add | Drop]:
    """At most one step a model: none while one of its replicas starts, ends or is being replaced."""
    if world.stop:
        return
    taken: Taken | None = None
    for model, units in scalable(world).items():
        trend = world.trends.get(model)
        if trend is None or any(unit.state != "ready" or unit.ending or unit.leaving for unit in units):
            continue
        if load_of(world, model, units, now) is None:
            continue
        what = due(trend, len(units), world.scaling, now)
        if what == "fewer":
            yield Drop(_dispensable(world, units).id, "little to do")
        elif what == "more":
            taken = taken or booked(world)
            plan = another(world, units, taken)
            if plan:
                taken.add(plan)
                yield Add(plan.id, plan, trend.why)


def booked(world: World) -> Taken:
    """What the replicas that are planned or still live have of each device."""
    plans = [unit.plan for unit in world.of_kind("runner") if isinstance(unit.plan, RunnerPlan)]
    return Taken.by(world.room, plans, world.kinds)


def another(world: World, units: list[Unit], taken: Taken) -> RunnerPlan | None:
    """A plan for one more replica on a device that has room for it; None = there is none."""
    pattern = units[0].plan
    assert isinstance(pattern, RunnerPlan)
    ledger = Ledger(world)
    name = free_name(pattern.model, world.units)
    for device in candidates(pattern, taken):
        plan = elsewhere(pattern, name, device)
        now = dict.fromkeys(plan.devices, plan.awake_bytes)
        if taken.takes(plan) and ledger.fits(now):
            return plan
    return None


def _dispensable(world: World, units: list[Unit]) -> Unit:
    """The replica with the fewest requests, of equals the one that was started last."""

    def flight(unit: Unit) -> int:
        return sum(u.replicas.get(unit.id, _NOTHING).in_flight for _, u in workers(world) if u)

    return min(reversed(units), key=lambda unit: (flight(unit), -unit.started_at))
