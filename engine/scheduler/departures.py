"""How units that the plan asks no more for take their leave. Pure.

One that serves stays in the route table until its successors are ready; then it leaves the table, and ends
once every gateway worker uses a table without it. Its requests in flight run to their end (or deadline) in
its own drain.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.scheduler.idleness import workers
from engine.scheduler.messages import Depart, Terminate
from engine.scheduler.units import Unit, World


def departures(world: World, now: float) -> Iterator[Depart | Terminate]:
    """What is due for units that leave; the units of a world that is not being stopped."""
    for unit in world.units.values():
        if unit.leaving is None or unit.process is None or unit.ending or unit.moving or unit.fault:
            continue
        if not all(_is_up(world, name, now) for name in unit.leaving.successors):
            continue
        if unit.kind == "runner" and unit.state == "ready":
            yield Depart(unit.id, unit.leaving.reason)
        elif unit.farewell is None or _is_known(world, unit, now):
            yield _end(world, unit, unit.leaving.reason)


def departure_timers(world: World) -> Iterator[float]:
    """When one may go though nothing happens."""
    for unit in world.units.values():
        if unit.leaving is None or unit.process is None or unit.ending:
            continue
        if unit.farewell:
            yield unit.farewell.since + world.policy.acknowledge_s
        for name in unit.leaving.successors:
            if name in world.units and world.units[name].kind == "gateway":
                yield world.units[name].started_at + world.policy.acknowledge_s


def _is_up(world: World, name: str, now: float) -> bool:
    """Whether a successor serves; one that is no more is not waited for."""
    unit = world.units.get(name)
    if unit is None:
        return True
    if unit.kind == "gateway":
        # Workers share a port, so that one answers does not tell which: a report has its sender's number.
        known = unit.process is not None and unit.process.pid in world.usage
        return unit.state == "ready" and (known or now >= unit.started_at + world.policy.acknowledge_s)
    return unit.state in ("ready", "asleep")


def _is_known(world: World, unit: Unit, now: float) -> bool:
    """Whether every gateway worker uses a table without it, or one has had long enough to."""
    left = unit.farewell
    assert left is not None, "only who has left the table is asked about"
    if now >= left.since + world.policy.acknowledge_s:
        return True
    for gateway, usage in workers(world):
        if usage is None and gateway.started_at > left.since:
            # It has yet to read its first table, which will be a later one.
            continue
        if usage is None or not left.version < usage.version <= world.published:
            return False
    return True


def _end(world: World, unit: Unit, reason: str) -> Terminate:
    policy = world.policy
    drain = policy.gateway_drain_s if unit.kind == "gateway" else policy.drain_s
    return Terminate(unit.id, policy.stop_timeout_s + drain, "draining", "stopped", reason)
