"""How the world changes: by an action that is now under way, and by an event that has happened."""

from __future__ import annotations

from collections.abc import Iterable

from engine.scheduler import moves
from engine.scheduler.messages import (
    Action,
    Add,
    Check,
    Depart,
    Drop,
    Event,
    Exited,
    Gone,
    Healthy,
    Launch,
    Launched,
    LaunchFailed,
    Measured,
    Missed,
    Progressed,
    Renewed,
    Restore,
    Settle,
    Sleep,
    SleepFailed,
    Slept,
    StopAsked,
    Sweep,
    Terminate,
    UsageReported,
    Wake,
    WakeAsked,
    WakeFailed,
    WakeLeft,
    Warmed,
    WarmFailed,
    WarmUp,
    Withdraw,
    Woken,
)
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.scaling import take_stock
from engine.scheduler.statefile import UnitRecord
from engine.scheduler.trend import begun_anew, grown
from engine.scheduler.units import (
    Demand,
    Ending,
    GatewayPlan,
    Leaving,
    Placed,
    Stop,
    Unit,
    UnitKind,
    UnitPlan,
    Usage,
    Withdrawal,
    World,
)

#: A preparation may download anew each time, so it waits this many times as long between tries.
PREPARATION_PATIENCE = 5


def kind_of(plan: UnitPlan) -> UnitKind:
    """What kind of unit a plan is for."""
    if isinstance(plan, RunnerPlan):
        return "runner"
    return "gateway" if isinstance(plan, GatewayPlan) else "preparation"


def begin(world: World, plans: Iterable[UnitPlan], left: Iterable[UnitRecord], now: float) -> None:
    """Fills an empty world with what is wanted and with what an earlier scheduler left alive.

    A living process whose plan is unchanged is adopted as it is: one that was ready stays ready, a sleeper
    asleep, and its next health check will tell; one that was falling asleep or waking is asked which. One
    that is not wanted, or was started otherwise, is there to be ended.
    """
    for plan in plans:
        world.units[plan.id] = Unit(plan.id, kind_of(plan), plan, since=now)
    for record in left:
        unit = world.units.get(record.id)
        if unit is None:
            unit = Unit(record.id, record.kind, None, since=now, left_on=record.device)
            world.units[record.id] = unit
        unit.process = record.process
        unit.running = record.fingerprint
        unit.started_at = now
        unit.check_due = now
        unit.launches = 1
        unit.adopted = True
        _adopt_state(unit, record, now)
        if record.state == "ending" or record.kind == "preparation":
            # A preparation is begun anew: what it printed is lost.
            unit.fault = "left over from an earlier scheduler"
            unit.running = unit.plan.fingerprint if unit.plan else ""


def _adopt_state(unit: Unit, record: UnitRecord, now: float) -> None:
    if record.kind == "runner":
        unit.placed = record.placed or _placed(unit.plan) or Placed(())
        unit.awake = record.awake and record.state != "asleep"
    match record.state:
        case "ready":
            unit.become("ready", now)
            unit.awake_since = now
            # What is ready was warmed.
            unit.warming_asked = True
        case "asleep":
            unit.become("asleep", now)
        case "moving":
            unit.become("waking", now)
            unit.unsettled = True
        case _:
            unit.become("starting", now)


def _placed(plan: UnitPlan | None) -> Placed | None:
    if not isinstance(plan, RunnerPlan):
        return None
    return Placed(plan.devices, plan.awake_bytes, plan.asleep_bytes, plan.host_bytes)


def commit(world: World, action: Action, now: float) -> None:
    """Writes down that an action is under way, before it is carried out."""
    if isinstance(action, Add):
        _add(world, action, now)
        return
    unit = world.units[action.unit]
    match action:
        case Launch():
            unit.after = unit.reason if unit.failures else ""
            unit.become("starting", now)
            unit.started_at = now
            unit.check_due = now + world.policy.start_check_s
            unit.checking = False
            unit.warming_asked = False
            unit.missed = 0
            unit.fault = ""
            unit.detail = ""
            unit.adopted = False
            unit.log_tail = ()
            unit.progress = None
            unit.memory_bytes = None
            unit.running = unit.plan.fingerprint if unit.plan else ""
            unit.placed = _placed(unit.plan)
            unit.awake = unit.kind == "runner"
            moves.stop(unit)
        case Check():
            unit.checking = True
        case WarmUp():
            unit.warming_asked = True
        case Terminate():
            if action.then == "backoff":
                _count_failure(world, unit, now)
            unit.become(action.state, now, action.reason)
            unit.ending = Ending(deadline=now + action.grace_s, then=action.then)
            moves.stop(unit)
        case Sweep():
            if unit.ending:
                unit.ending.swept = True
        case Withdraw() | Restore() | Sleep() | Wake() | Settle():
            moves.begin(world, unit, action, now)
        case Depart():
            unit.withdrawal = None
            unit.farewell = Withdrawal(now, version=world.published)
            unit.become("draining", now, action.reason)
        case Drop():
            unit.leaving = Leaving(action.reason)
            world.trends[unit.model] = begun_anew(world.trends[unit.model])


def _add(world: World, action: Add, now: float) -> None:
    """One more unit, behind those of its model."""
    model = action.plan.model
    world.trends[model] = grown(world.trends[model])
    units: dict[str, Unit] = {}
    new = Unit(action.unit, "runner", action.plan, since=now)
    last = [unit.id for unit in world.of_kind("runner") if unit.model == model and not unit.owner][-1]
    for name, unit in world.units.items():
        units[name] = unit
        if name == last:
            units[new.id] = new
    world.units.clear()
    world.units.update(units)


def apply(world: World, event: Event, now: float) -> None:
    """Takes an event into account; one about a process that is no longer the unit's is ignored."""
    match event:
        case StopAsked():
            _stop(world, event, now)
            return
        case Renewed():
            return
        case WakeAsked():
            world.demands.setdefault(event.model, Demand()).waiters[event.waiter] = now
            return
        case WakeLeft():
            moves.leave(world, event)
            return
        case UsageReported():
            if any(unit.process and unit.process.pid == event.worker for unit in world.of_kind("gateway")):
                world.usage[event.worker] = Usage(event.version, event.replicas, event.models, now)
            take_stock(world, now)
            return
    unit = world.units.get(event.unit)
    if unit is None:
        return
    match event:
        case Launched():
            unit.process = event.process
            unit.launches += 1
        case LaunchFailed():
            _count_failure(world, unit, now)
            unit.placed = None
            unit.awake = False
            unit.become("backoff", now, "its process could not be started")
            unit.detail = event.reason
        case Progressed():
            unit.progress = event.progress
        case _:
            if event.process == unit.process:
                _apply_to_process(world, unit, event, now)


def _apply_to_process(
    world: World,
    unit: Unit,
    event: Exited
    | Gone
    | Healthy
    | Missed
    | Warmed
    | WarmFailed
    | Slept
    | SleepFailed
    | Woken
    | WakeFailed
    | Measured,
    now: float,
) -> None:
    policy = world.policy
    match event:
        case Exited():
            _exited(world, unit, event, now)
        case Gone():
            _gone(world, unit, now)
        case Healthy():
            unit.checking = False
            unit.missed = 0
            unit.check_due = now + policy.health_interval_s
            if unit.state == "starting" and not unit.ending:
                unit.become("warming" if unit.kind == "runner" else "ready", now)
        case Missed():
            unit.checking = False
            if unit.state == "starting":
                unit.check_due = now + policy.start_check_s
                return
            unit.check_due = now + policy.health_interval_s
            if isinstance(unit.plan, GatewayPlan) and not unit.plan.alone:
                # Workers share one port, so a missed answer does not tell whose it was.
                return
            unit.missed += 1
            if unit.missed >= policy.health_failures:
                unit.fault = f"no answer to {unit.missed} health checks in a row ({event.reason})"
        case Warmed():
            if unit.state == "warming" and not unit.ending:
                moves.warmed(world, unit, now)
        case WarmFailed():
            if unit.state == "warming" and not unit.ending:
                unit.fault = event.reason
        case Slept() | SleepFailed() | Woken() | WakeFailed():
            if unit.moving and not unit.ending:
                moves.end(world, unit, event, now)
        case Measured():
            unit.memory_bytes = event.memory_bytes
            unit.expert_balance = event.expert_balance


def _exited(world: World, unit: Unit, event: Exited, now: float) -> None:
    unit.log_tail = event.log_tail
    unit.detail = event.detail
    if unit.ending:
        # It went as asked; what it may have left behind goes now.
        unit.ending.deadline = min(unit.ending.deadline, now)
        unit.ending.exited = True
        return
    if unit.kind == "preparation" and event.result is not None:
        unit.result = event.result
        unit.ending = Ending(deadline=now, then="ready", exited=True)
        return
    if world.stop or unit.plan is None or unit.leaving:
        unit.become("draining", now, event.reason)
        unit.ending = Ending(deadline=now, then="stopped", exited=True)
        return
    _count_failure(world, unit, now)
    moves.stop(unit)
    unit.become("failed", now, event.reason)
    unit.ending = Ending(deadline=now, then="backoff", exited=True)


def _gone(world: World, unit: Unit, now: float) -> None:
    then = unit.ending.then if unit.ending else "backoff"
    if unit.kind == "gateway" and unit.process:
        world.usage.pop(unit.process.pid, None)
    unit.process = None
    unit.ending = None
    unit.checking = False
    unit.memory_bytes = None
    unit.placed = None
    unit.awake = False
    unit.awake_since = 0.0
    moves.stop(unit)
    if unit.plan is None or unit.leaving:
        forget(world, unit.id)
    elif world.stop:
        unit.become("stopped", now)
    elif then == "backoff":
        unit.become("backoff", now, unit.reason)
    else:
        # What was to be no more may have been asked for again meanwhile.
        unit.become("planned" if then == "stopped" else then, now)
        unit.failures = 0
        unit.retry_at = 0.0


def forget(world: World, name: str) -> None:
    """A unit is no more; who waited for its memory waits for it no longer."""
    del world.units[name]
    for unit in world.units.values():
        unit.waits -= {name}


def _count_failure(world: World, unit: Unit, now: float) -> None:
    """Doubles the wait; a unit that had been ready for a good while begins again with the shortest."""
    policy = world.policy
    if unit.state in ("ready", "asleep") and now - unit.since >= policy.backoff_max_s:
        unit.failures = 0
    unit.failures += 1
    doublings = min(unit.failures - 1, 30)
    wait = min(policy.backoff_max_s, policy.backoff_first_s * 2**doublings)
    unit.retry_at = now + wait * (PREPARATION_PATIENCE if unit.kind == "preparation" else 1)


def _stop(world: World, event: StopAsked, now: float) -> None:
    if world.stop is None:
        world.stop = Stop(now, drain=event.drain, kill=event.kill)
        for unit in world.units.values():
            if unit.process is None:
                unit.become("stopped", now)
    else:
        world.stop.drain = world.stop.drain and event.drain
        world.stop.kill = world.stop.kill or event.kill
    if not world.stop.drain:
        for unit in world.units.values():
            if unit.ending:
                unit.ending.deadline = min(unit.ending.deadline, now + world.policy.stop_timeout_s)
