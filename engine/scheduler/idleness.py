"""Whether anybody uses a replica, by what the gateway workers report. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from engine.scheduler.units import ReplicaUsage, Unit, Usage, World

_NOTHING = ReplicaUsage()


def workers(world: World) -> Iterator[tuple[Unit, Usage | None]]:
    """The living gateway workers, each with its last report."""
    for gateway in world.of_kind("gateway"):
        if gateway.process:
            yield gateway, world.usage.get(gateway.process.pid)


def in_use(world: World, unit: Unit) -> bool:
    """Whether a worker has a request at the replica, or one that waits for its model."""
    if _is_reported(world, unit):
        return True
    asked = (usage.models.get(unit.model) for _, usage in workers(world) if usage)
    return any(model and model.waiting for model in asked)


def _is_reported(world: World, unit: Unit) -> bool:
    """Whether a living worker has said that a request is in flight at the replica."""
    return any(usage and usage.replicas.get(unit.id, _NOTHING).in_flight for _, usage in workers(world))


def last_used(world: World, unit: Unit) -> float:
    """When a request last began or ended there, the loop's clock; it becoming ready counts as one."""
    times = [unit.awake_since]
    for _, usage in workers(world):
        if usage and unit.id in usage.replicas:
            times.append(usage.at - usage.replicas[unit.id].idle_s)
    return max(times)


def is_known(world: World, unit: Unit, now: float) -> bool:
    """Whether every worker has seen it ready, so that those who waited for it have had their turn."""
    if now - unit.awake_since >= world.policy.acknowledge_s:
        return True
    return all(usage and _has(world, usage, unit.awake_version) for _, usage in workers(world))


def quietness(world: World, unit: Unit, now: float) -> Literal["quiet", "wait", "busy"]:
    """Whether a withdrawn replica may fall asleep.

    Quiet = every living worker uses a table without it and has nothing in flight there. A worker that does
    not say so in time is taken to be busy with it.
    """
    left = unit.withdrawal
    assert left is not None, "only what was withdrawn is asked about"
    if not left.room_for:
        # This scheduler has never offered it, but a table from before it was started again may have; what no
        # worker has reported yet, the runner itself refuses to sleep through.
        return "busy" if _is_reported(world, unit) else "quiet"
    policy = world.policy
    answer: Literal["quiet", "wait"] = "quiet"
    for gateway, usage in workers(world):
        if usage is None and gateway.started_at > left.since:
            # It has yet to read its first table, which will be a later one.
            continue
        if usage is None or not _has(world, usage, left.version):
            patience = policy.acknowledge_s
        elif usage.replicas.get(unit.id, _NOTHING).in_flight:
            patience = policy.quiet_s
        else:
            continue
        if now >= left.since + patience:
            return "busy"
        answer = "wait"
    return answer


def _has(world: World, usage: Usage, version: int) -> bool:
    """Whether a worker uses a table later than ``version``, one that this scheduler has published."""
    return version < usage.version <= world.published
