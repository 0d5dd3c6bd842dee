"""Whose turn it is: which units may start, how long it takes, and what stands in the way. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.scheduler.plan import RunnerPlan
from engine.scheduler.units import Unit, World


def may_start(world: World, unit: Unit, now: float) -> bool:
    """Whether the unit has no process, its wait is over, and what it needs is there (memory aside)."""
    if not unit.wanted or unit.process is not None or unit.leaving or unit.waits:
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


#: Share of its start that waking a model is guessed to take before it was measured.
_WAKE_SHARE = 0.1


def expected_wake_s(world: World, unit: Unit) -> float:
    """Seconds from asleep to ready: as long as last time, else a tenth of a start by the catalog."""
    if not isinstance(unit.plan, RunnerPlan):
        return 0.0
    return world.wakes.get(unit.plan.model, unit.plan.entry.warm_up_s * _WAKE_SHARE)


class Turns:
    """The places on each device for what must not happen beside each other.

    On a GPU one at a time loads, wakes, falls asleep or ends: who loads beside another measures memory that
    is not its own. On a CPU ``concurrent_starts`` may load.
    """

    def __init__(self, world: World) -> None:
        self._most = world.policy.concurrent_starts
        self._loading: Counter[str] = Counter()
        self._taken: set[str] = set()
        for unit in world.of_kind("runner"):
            if unit.starting:
                self.start(unit.devices)
            elif unit.moving or unit.ending:
                self.move(unit.devices)

    def may_start(self, devices: Iterable[str]) -> bool:
        """Whether one more may load on all of these."""
        return self.may_move(devices) and all(self._loading[device] < self._most for device in devices)

    def may_move(self, devices: Iterable[str]) -> bool:
        """Whether one may wake or fall asleep on all of these."""
        return self._taken.isdisjoint(devices)

    def start(self, devices: Iterable[str]) -> None:
        self.move(devices)
        self._loading.update(devices)

    def move(self, devices: Iterable[str]) -> None:
        self._taken.update(device for device in devices if device.startswith("cuda"))
