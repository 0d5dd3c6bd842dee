"""A world that goes over from one plan to another. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.scheduler.plan import RunnerPlan
from engine.scheduler.replan import Replan, Stood
from engine.scheduler.rolling import Rolling
from engine.scheduler.transitions import forget, kind_of
from engine.scheduler.units import GatewayPlan, Leaving, PreparationPlan, Unit, UnitPlan, World


@dataclass
class Standing:
    """What a world has when a new plan is made."""

    runners: list[Stood] = field(default_factory=list)
    #: Replicas that are on their way out, and are not to be had back.
    going: list[RunnerPlan] = field(default_factory=list)
    gateways: list[GatewayPlan] = field(default_factory=list)
    gateways_going: list[GatewayPlan] = field(default_factory=list)


def survey(world: World) -> Standing:
    """What the world's units are, as planning sees them."""
    seen = Standing()
    for unit in world.units.values():
        gone = _is_going(unit)
        if isinstance(unit.plan, RunnerPlan):
            if gone:
                seen.going.append(unit.plan)
            else:
                seen.runners.append(Stood(unit.plan, _serves(unit), unit.process is not None))
        elif isinstance(unit.plan, GatewayPlan):
            (seen.gateways_going if gone else seen.gateways).append(unit.plan)
    return seen


def _is_going(unit: Unit) -> bool:
    """Whether it can no longer be kept: it has left the table for good, or ends and was to leave."""
    return bool(unit.farewell or (unit.leaving and unit.ending))


def _serves(unit: Unit) -> bool:
    if unit.process is None or unit.ending or unit.fault:
        return False
    # One that is withdrawn to fall asleep serves again when it is asked for.
    return unit.state in ("ready", "asleep", "waking") or unit.withdrawal is not None


def renew(
    world: World, gateways: Rolling, preparations: Sequence[PreparationPlan], runners: Replan, now: float
) -> None:
    """Takes over a new plan: units come, stay or are told to leave; nothing is started or ended here."""
    leaving = {**gateways.leaving, **runners.leaving}
    waits = {**gateways.waits, **runners.waits}
    old = dict(world.units)
    world.units.clear()
    plans: list[UnitPlan] = [*gateways.plans, *preparations, *runners.runners]
    for plan in plans:
        world.units[plan.id] = _take_up(old.pop(plan.id, None), plan, now)
    for unit in old.values():
        _let_go(unit, leaving.get(unit.id))
    # Those that leave stand behind their model's others, in their order.
    world.units.update(old)
    for unit in [unit for unit in old.values() if unit.process is None]:
        forget(world, unit.id)
    for name, others in waits.items():
        world.units[name].waits = frozenset(other for other in others if other in world.units)


def _take_up(unit: Unit | None, plan: UnitPlan, now: float) -> Unit:
    if unit is None:
        return Unit(plan.id, kind_of(plan), plan, since=now)
    if isinstance(plan, PreparationPlan) and unit.plan != plan and unit.process is None:
        # What it gave before belongs to other weights.
        return Unit(plan.id, unit.kind, plan, since=now)
    unit.plan = plan
    unit.leaving = None
    unit.waits = frozenset()
    return unit


def _let_go(unit: Unit, leaving: Leaving | None) -> None:
    if unit.kind == "preparation":
        unit.plan = None
    elif not _is_going(unit):
        unit.leaving = leaving or Leaving("no longer asked for")
