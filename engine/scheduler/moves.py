"""How the world changes as standby replicas leave the route table, fall asleep and wake."""

from __future__ import annotations

from engine.scheduler.messages import (
    Restore,
    Settle,
    Sleep,
    SleepFailed,
    Slept,
    Wake,
    WakeFailed,
    WakeLeft,
    Withdraw,
    Woken,
)
from engine.scheduler.units import Unit, Withdrawal, World


def begin(world: World, unit: Unit, action: Withdraw | Restore | Sleep | Wake | Settle, now: float) -> None:
    """Writes down that a move is under way."""
    match action:
        case Withdraw():
            unit.withdrawal = Withdrawal(now, action.room_for, world.published)
            unit.become("draining", now, f"making room for {_name(world, action.room_for)}")
        case Restore():
            unit.withdrawal = None
            unit.become("ready", now)
            unit.check_due = now
            if action.asked or not unit.awake_since:
                _awake(world, unit, now)
            if action.busy:
                unit.spared_until = now + world.policy.spare_s
        case Sleep():
            unit.moving = True
        case Wake():
            unit.moving = True
            unit.awake = True
            unit.become("waking", now)
        case Settle():
            unit.moving = True


def _name(world: World, unit: str) -> str:
    known = world.units.get(unit)
    return known.model if known and known.model else unit


def stop(unit: Unit) -> None:
    """No move is under way any more: the process starts or ends."""
    unit.withdrawal = None
    unit.moving = False
    unit.unsettled = False
    unit.spared_until = 0.0


def warmed(world: World, unit: Unit, now: float) -> None:
    """It has loaded and answered: ready, or (a standby that nobody asks for) about to fall asleep."""
    if unit.model and not unit.adopted:
        world.durations[unit.model] = now - unit.started_at
    unit.check_due = now + world.policy.health_interval_s
    if unit.standby and unit.model not in world.demands:
        # It never was in the route table, so there is nobody to wait for.
        unit.withdrawal = Withdrawal(now)
        unit.become("draining", now, "loaded; falling asleep until it is asked for")
        return
    unit.become("ready", now)
    _awake(world, unit, now)


def _awake(world: World, unit: Unit, now: float) -> None:
    unit.awake_since = now
    unit.awake_version = world.published


def end(world: World, unit: Unit, event: Slept | SleepFailed | Woken | WakeFailed, now: float) -> None:
    """The end of falling asleep or waking; one that was neither in time must start again."""
    known = not unit.unsettled
    unit.moving = False
    unit.unsettled = False
    unit.check_due = now + world.policy.health_interval_s
    match event:
        case Slept():
            unit.withdrawal = None
            unit.awake = False
            unit.become("asleep", now)
        case Woken():
            if known and unit.model:
                world.wakes[unit.model] = now - unit.since
            unit.withdrawal = None
            unit.become("ready", now)
            _awake(world, unit, now)
        case SleepFailed() if event.busy:
            unit.withdrawal = None
            unit.become("ready", now)
            if not unit.awake_since:
                _awake(world, unit, now)
            unit.spared_until = now + world.policy.spare_s
        case SleepFailed() | WakeFailed():
            unit.fault = event.reason


def leave(world: World, event: WakeLeft) -> None:
    """One who waited does so no more."""
    demand = world.demands.get(event.model)
    if demand:
        demand.waiters.pop(event.waiter, None)
        if not demand.waiters:
            del world.demands[event.model]
