"""Memory of the devices as decisions see it: what is held, what is free, what comes back. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from engine.scheduler.plan import RunnerPlan
from engine.scheduler.units import Unit, World

#: Bytes by device.
Amount = Mapping[str, int]


def held_by(unit: Unit) -> Amount:
    """What a unit takes of each device: what its process holds, or what is reserved where that is more.

    A resident's memory is reserved whether it runs or not. A standby's process holds that of one awake from
    its launch until it is asleep, and again from its wake until it is asleep or gone.
    """
    living = _living(unit)
    reserved = _reserved(unit)
    return {d: max(living.get(d, 0), reserved.get(d, 0)) for d in {**living, **reserved}}


def _living(unit: Unit) -> Amount:
    if unit.placed is None:
        return {}
    size = unit.placed.awake_bytes if unit.awake else unit.placed.asleep_bytes
    return dict.fromkeys(unit.placed.devices, size)


def _reserved(unit: Unit) -> Amount:
    if not isinstance(unit.plan, RunnerPlan) or unit.standby or unit.waits or unit.leaving:
        # One that waits for others to end takes over what they hold; one that leaves needs no more.
        return {}
    return dict.fromkeys(unit.plan.devices, unit.plan.awake_bytes)


def needed_by(unit: Unit) -> Amount:
    """What a unit takes of each device beyond what it holds, once it is started or woken."""
    if unit.placed:
        target: Amount = dict.fromkeys(unit.placed.devices, unit.placed.awake_bytes)
    elif isinstance(unit.plan, RunnerPlan):
        target = dict.fromkeys(unit.plan.devices, unit.plan.awake_bytes)
    else:
        return {}
    held = held_by(unit)
    return {device: max(0, size - held.get(device, 0)) for device, size in target.items()}


def relief_of(unit: Unit) -> Amount:
    """What a standby replica that is awake gives back of each device when it falls asleep."""
    if unit.placed is None or not unit.awake:
        return {}
    size = max(0, unit.placed.awake_bytes - unit.placed.asleep_bytes)
    return dict.fromkeys(unit.placed.devices, size)


def held(world: World) -> Counter[str]:
    """Bytes held or reserved of each device."""
    total: Counter[str] = Counter()
    for unit in world.of_kind("runner"):
        total.update(held_by(unit))
    return total


def host_held(world: World) -> int:
    """Host memory, bytes, of the weights of those that are asleep, falling asleep or waking."""
    return sum(
        unit.placed.host_bytes
        for unit in world.of_kind("runner")
        if unit.placed and (unit.moving or unit.unsettled or not unit.awake)
    )


def host_takes(world: World, unit: Unit) -> bool:
    """Whether host memory has room for the weights of one more sleeper."""
    if world.host_room is None or unit.placed is None:
        return True
    return host_held(world) + unit.placed.host_bytes <= world.host_room


class Ledger:
    """Free memory of each device while decisions are made, one after the other.

    ``free`` may be used now. ``soon`` adds what is sure to come back: from those that are falling asleep or
    ending. Devices without a bound are in neither.
    """

    def __init__(self, world: World) -> None:
        taken = held(world)
        self.free = {device: room - taken[device] for device, room in world.room.items()}
        self.soon = dict(self.free)
        #: Taken from both since.
        self._given: Counter[str] = Counter()
        for unit in world.of_kind("runner"):
            if unit.ending:
                reserved = _reserved(unit)
                back = {d: size - reserved.get(d, 0) for d, size in held_by(unit).items()}
                self.expect(back)
            elif unit.moving and unit.withdrawal:
                self.expect(relief_of(unit))

    def fits(self, need: Amount) -> bool:
        """Whether there is room for it now; on a device that is over its room there is for nothing."""
        return not self._lacks(self.free, need)

    def short(self, need: Amount) -> dict[str, int]:
        """What will still lack of each device; empty = it will fit."""
        return self._lacks(self.soon, need)

    def _lacks(self, there: Amount, need: Amount) -> dict[str, int]:
        lacks: dict[str, int] = {}
        for device, size in need.items():
            if device in there:
                # What is kept for others is no hindrance to one whose own memory is reserved already.
                lacks[device] = size - there[device] - (0 if size else self._given[device])
        return {device: size for device, size in lacks.items() if size > 0}

    def take(self, need: Amount) -> None:
        """Memory is used, or kept for one that goes first."""
        for device, size in need.items():
            if device in self.free:
                self.free[device] -= size
                self.soon[device] -= size
                self._given[device] += size

    def expect(self, relief: Amount) -> None:
        """Memory will come back."""
        for device, size in relief.items():
            if device in self.soon:
                self.soon[device] += size


def covers(reliefs: Iterable[Amount], short: Amount) -> bool:
    """Whether these together make up for what lacks."""
    total: Counter[str] = Counter()
    for relief in reliefs:
        total.update(relief)
    return all(total[device] >= size for device, size in short.items())
