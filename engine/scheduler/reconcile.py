"""What to do next: a pure function of the world and the clock.

:func:`reconcile` only reads. The run loop hands each action to :func:`engine.scheduler.transitions.commit`,
which writes down that it is under way, and then carries it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from engine.scheduler.messages import Action, Check, Launch, Sweep, Terminate, WarmUp
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.units import Unit, World


def reconcile(world: World, now: float) -> list[Action]:
    """The actions that are due at ``now`` (the loop's clock, seconds)."""
    endings = list(_endings(world, now))
    ending = {action.unit for action in endings}
    watches = (action for action in _watches(world, now) if action.unit not in ending)
    return [*endings, *watches, *_launches(world, now)]


def next_wakeup(world: World, now: float) -> float | None:
    """When something will be due though nothing happens; None = never.

    Always after ``now`` once everything that :func:`reconcile` gave has been committed.
    """
    times = [time for unit in world.units.values() for time in _timers(world, unit, now)]
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
    return unit.kind != "preparation" and unit.state in ("starting", "ready")


def _launches(world: World, now: float) -> Iterator[Action]:
    if world.stop:
        return
    waiting = [unit for unit in world.units.values() if _may_launch(world, unit, now)]
    taken = Counter(unit.device for unit in world.of_kind("runner") if _takes_a_place(unit))
    # The longest start first: it decides when all are ready.
    for unit in sorted(waiting, key=lambda unit: -expected_s(world, unit)):
        if unit.kind == "runner":
            if taken[unit.device] >= world.policy.concurrent_starts:
                continue
            taken[unit.device] += 1
        yield Launch(unit.id)


def _takes_a_place(unit: Unit) -> bool:
    """Loading, or (on a GPU) ending: who starts beside it would measure memory that is not back yet."""
    return unit.starting or (unit.device.startswith("cuda") and unit.ending is not None)


def _may_launch(world: World, unit: Unit, now: float) -> bool:
    if not unit.wanted or unit.process is not None:
        return False
    if unit.state not in ("planned", "backoff") or now < unit.retry_at:
        return False
    if unit.kind == "preparation":
        # Only for runners that are yet to start: those that live have their weights.
        return any(user.needs == unit.id and user.process is None for user in world.of_kind("runner"))
    if unit.needs is None:
        return True
    weights = world.units.get(unit.needs)
    return weights is not None and weights.state == "ready"


def expected_s(world: World, unit: Unit) -> float:
    """Seconds from start to ready: as long as last time, else what the catalog says."""
    if not isinstance(unit.plan, RunnerPlan):
        return 0.0
    return world.durations.get(unit.plan.model, unit.plan.entry.warm_up_s)


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
