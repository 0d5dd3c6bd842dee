"""What to do next: a pure function of the world and the clock.

:func:`reconcile` only reads. The run loop hands each action to :func:`engine.scheduler.transitions.commit`,
which writes down that it is under way, and then carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.scheduler.departures import departure_timers, departures
from engine.scheduler.messages import Action, Check, Launch, Sweep, Terminate, WarmUp
from engine.scheduler.scaling import scale
from engine.scheduler.starts import may_start
from engine.scheduler.tiers import tier_actions, tier_timers
from engine.scheduler.units import Unit, World


def reconcile(world: World, now: float) -> list[Action]:
    """The actions that are due at ``now`` (the loop's clock, seconds)."""
    endings = [*_endings(world, now)]
    if not world.stop:
        found = {action.unit for action in endings}
        endings += [action for action in departures(world, now) if action.unit not in found]
    ending = {action.unit for action in endings}
    watches = (action for action in _watches(world, now) if action.unit not in ending)
    if world.stop:
        return [*endings, *watches]
    starts = [*_starts(world, now), *scale(world, now)]
    # What ends now may stand in the way of a start, which the next look will see.
    return [*endings, *watches, *starts, *([] if endings else tier_actions(world, now))]


def next_wakeup(world: World, now: float) -> float | None:
    """When something will be due though nothing happens; None = never.

    Always after ``now`` once everything that :func:`reconcile` gave has been committed.
    """
    times = [time for unit in world.units.values() for time in _timers(world, unit, now)]
    if not world.stop:
        times += [t for t in (*tier_timers(world, now), *departure_timers(world)) if t > now]
    return min(times, default=None)


def _endings(world: World, now: float) -> Iterator[Action]:
    gateways_live = any(unit.process for unit in world.of_kind("gateway"))
    for unit in world.units.values():
        if unit.process is None:
            continue
        if unit.ending:
            if not unit.ending.swept and (now >= unit.ending.deadline or _killing(world)):
                yield Sweep(unit.id, at_once=_killing(world) or not unit.ending.exited)
        elif _killing(world):
            yield _terminate(world, unit, "stopped", "stopping at once", drain=False)
        elif world.stop:
            # Gateways end first: the requests that they still carry need their runners.
            if unit.kind != "runner" or not gateways_live:
                yield _terminate(world, unit, "stopped", "stopping", drain=world.stop.drain)
        elif unit.plan is None:
            yield _terminate(world, unit, "stopped", "no longer asked for", drain=True)
        elif unit.running != unit.plan.fingerprint:
            yield _terminate(world, unit, "planned", "starting again with changed settings", drain=True)
        elif fault := unit.fault or _too_slow(world, unit, now):
            yield _terminate(world, unit, "backoff", fault, drain=False)


def _killing(world: World) -> bool:
    return world.stop is not None and world.stop.kill


def _too_slow(world: World, unit: Unit, now: float) -> str:
    limit = world.policy.start_timeout_s
    if unit.kind == "preparation" or unit.state != "starting" or now < unit.started_at + limit:
        return ""
    return (
        f"not loaded after {limit:g} s; its log tells how far it came. "
        "Raise `start_timeout_s` in [scheduler] if it only needs longer"
    )


def _terminate(
    world: World,
    unit: Unit,
    then: str,
    reason: str,
    *,
    drain: bool,
) -> Terminate:
    policy = world.policy
    longest = policy.gateway_drain_s if unit.kind == "gateway" else policy.drain_s
    grace = policy.stop_timeout_s + (longest if drain and unit.kind != "preparation" else 0.0)
    if then == "backoff":
        return Terminate(unit.id, grace, "failed", "backoff", reason)
    if then == "planned":
        return Terminate(unit.id, grace, "draining", "planned", reason)
    return Terminate(unit.id, grace, "draining", "stopped", reason)


def _watches(world: World, now: float) -> Iterator[Action]:
    if world.stop:
        return
    for unit in world.units.values():
        if unit.process is None or unit.ending or unit.fault or not unit.wanted:
            continue
        if unit.state == "warming" and not unit.warming_asked:
            yield WarmUp(unit.id)
        elif _is_checked(unit) and not unit.checking and now >= unit.check_due:
            yield Check(unit.id)


def _is_checked(unit: Unit) -> bool:
    return unit.kind != "preparation" and unit.state in ("starting", "ready", "asleep")


def _starts(world: World, now: float) -> Iterator[Action]:
    """Starts of what takes no device memory."""
    for unit in world.units.values():
        if unit.kind != "runner" and may_start(world, unit, now):
            yield Launch(unit.id)


def _timers(world: World, unit: Unit, now: float) -> Iterator[float]:
    if unit.process is None:
        if unit.wanted and unit.state == "backoff" and unit.retry_at > now and not world.stop:
            yield unit.retry_at
    elif unit.ending:
        if not unit.ending.swept:
            yield unit.ending.deadline
    elif unit.kind != "preparation" and not world.stop:
        if unit.state == "starting":
            yield unit.started_at + world.policy.start_timeout_s
        if _is_checked(unit) and not unit.checking:
            yield unit.check_due
