"""Which devices replicas may stand on beside those that stand already; as few as possible move. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from engine.scheduler.plan import RunnerPlan, socket_path, spec_fingerprint

#: Trials of placing one replica, over the whole search: bounds its time to well under a second.
MOST_STEPS = 20_000

Rooms = Mapping[str, int]


def elsewhere(plan: RunnerPlan, unit: str, device: str) -> RunnerPlan:
    """The same replica under another id, on another device, with the socket that belongs to its id.

    Raises:
        PlanError: the socket's path would be too long.
    """
    if (unit, device) == (plan.id, plan.device):
        return plan
    socket = socket_path(plan.spec.socket.parent, unit)
    spec = plan.spec.model_copy(update={"socket": socket, "device": device})
    return replace(plan, id=unit, device=device, spec=spec, fingerprint=spec_fingerprint(spec, plan.entry))


@dataclass
class Taken:
    """What is booked of each device.

    Residents hold their memory always; standby replicas share what is left: each what it keeps asleep, and
    beside it the most that one of them takes on waking.
    """

    rooms: Rooms
    plans: dict[str, list[RunnerPlan]] = field(default_factory=dict)
    #: Product and owner by device, where a machine's GPUs differ: what was laid out for one kind stays on it.
    kinds: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def by(cls, rooms: Rooms, plans: Iterable[RunnerPlan], kinds: Mapping[str, str] | None = None) -> Taken:
        taken = cls(rooms, kinds=kinds or {})
        for plan in plans:
            taken.add(plan)
        return taken

    def add(self, plan: RunnerPlan) -> None:
        for device in plan.devices:
            self.plans.setdefault(device, []).append(plan)

    def remove(self, plan: RunnerPlan) -> None:
        for device in plan.devices:
            self.plans[device].remove(plan)

    def bytes_on(self, device: str, *more: RunnerPlan) -> int:
        """Bytes of the device that are spoken for, with those of ``more``."""
        fixed = gap = 0
        for plan in (*self.plans.get(device, ()), *more):
            if plan.standing.tier == "standby":
                fixed += plan.asleep_bytes
                gap = max(gap, plan.awake_bytes - plan.asleep_bytes)
            else:
                fixed += plan.awake_bytes
        return fixed + gap

    def takes(self, plan: RunnerPlan) -> bool:
        """Whether one more fits on its devices; one without a known room is unbounded."""
        return all(self.bytes_on(d, plan) <= self.rooms[d] for d in plan.devices if d in self.rooms)

    @property
    def fits(self) -> bool:
        return all(
            self.bytes_on(device) <= self.rooms[device] for device in self.plans if device in self.rooms
        )

    def free(self, device: str) -> int:
        return self.rooms.get(device, 0) - self.bytes_on(device)


def candidates(plan: RunnerPlan, taken: Taken, first: Sequence[str] = ()) -> Iterator[str]:
    """Devices, or sets of them, that a replica may stand on, the best first.

    Those named in ``first``, then the ones with the fewest replicas of the same model (what befalls one
    device is not to befall all of them), then where least is left over.
    """
    if plan.device.startswith("cpu"):
        yield plan.device
        return
    product = taken.kinds.get(plan.devices[0])
    first = [
        one
        for one in dict.fromkeys(first)
        if _is_like(one, plan.device) and taken.kinds.get(one.partition(",")[0]) == product
    ]
    yield from first
    kind = plan.device.partition(":")[0]
    names = sorted(
        (name for name in taken.rooms if name.startswith(f"{kind}:") and taken.kinds.get(name) == product),
        key=lambda name: int(name.partition(":")[2]),
    )

    def badness(group: Sequence[str]) -> tuple[int, int, int]:
        same = sum(other.model == plan.model for name in group for other in taken.plans.get(name, ()))
        numbers = [int(name.partition(":")[2]) for name in group]
        return same, sum(map(taken.free, group)), numbers[-1] - numbers[0]

    for group in sorted(combinations(names, len(plan.devices)), key=badness):
        device = f"{kind}:" + ",".join(name.partition(":")[2] for name in group)
        if device not in first:
            yield device


def _is_like(device: str, other: str) -> bool:
    """Of the same kind and as many: a replica over two devices cannot stand where one over one stood."""
    return device.partition(":")[0] == other.partition(":")[0] and device.count(",") == other.count(",")


@dataclass(frozen=True)
class Seeker:
    """A replica that must have a place."""

    #: As a plan from nothing would have it.
    plan: RunnerPlan
    #: The device where it stands now, unchanged; None = it has to be started anyway.
    at: str | None = None
    #: Where one that it replaces stands.
    near: str | None = None

    @property
    def first(self) -> tuple[str, ...]:
        return tuple(device for device in (self.at, self.near, self.plan.device) if device)


def seat(
    seekers: Sequence[Seeker],
    rooms: Rooms,
    kinds: Mapping[str, str] | None = None,
    steps: int = MOST_STEPS,
) -> list[str] | None:
    """A device for each, so that as few as possible of those that stand leave theirs.

    Zero moved ones are tried first, then each single one, each pair and so on, the cheapest first (asleep
    before awake, low priority before high, small before big); those that move and those that are new are
    placed by depth-first search, the biggest first. None = there is no way, or ``steps`` trials did not find
    it.
    """
    budget = _Budget(steps)
    stand = [index for index, seeker in enumerate(seekers) if seeker.at is not None]
    stand.sort(key=lambda index: _cost(seekers[index].plan))
    for count in range(len(stand) + 1):
        for moved in combinations(stand, count):
            found = _seat_these(seekers, Taken(rooms, kinds=kinds or {}), set(moved), budget)
            if found is not None or budget.spent:
                return found
    return None


def _cost(plan: RunnerPlan) -> tuple[bool, int, int]:
    return plan.standing.tier != "standby", plan.standing.priority, plan.awake_bytes * len(plan.devices)


@dataclass
class _Budget:
    left: int

    def spend(self) -> None:
        self.left -= 1

    @property
    def spent(self) -> bool:
        return self.left <= 0


def _seat_these(
    seekers: Sequence[Seeker], taken: Taken, moved: set[int], budget: _Budget
) -> list[str] | None:
    """A device for each, where all that stand stay but ``moved``; None = not possible, or budget spent."""
    devices = [seeker.at if index not in moved else None for index, seeker in enumerate(seekers)]
    for seeker, device in zip(seekers, devices, strict=True):
        if device is not None:
            taken.add(_on(seeker.plan, device))
    budget.spend()
    if not taken.fits:
        return None
    free = [index for index, device in enumerate(devices) if device is None]
    free.sort(key=lambda i: (-len(seekers[i].plan.devices), -seekers[i].plan.awake_bytes))
    return _descend(seekers, devices, free, taken, budget)


def _descend(
    seekers: Sequence[Seeker],
    devices: list[str | None],
    free: Sequence[int],
    taken: Taken,
    budget: _Budget,
) -> list[str] | None:
    if not free:
        return [device for device in devices if device is not None]
    index, *rest = free
    seeker = seekers[index]
    for device in candidates(seeker.plan, taken, seeker.first):
        if budget.spent:
            return None
        budget.spend()
        plan = _on(seeker.plan, device)
        if not taken.takes(plan):
            continue
        taken.add(plan)
        devices[index] = device
        found = _descend(seekers, devices, rest, taken, budget)
        if found is not None:
            return found
        taken.remove(plan)
        devices[index] = None
    return None


def _on(plan: RunnerPlan, device: str) -> RunnerPlan:
    """For reckoning only: its spec still names the old device."""
    return plan if plan.device == device else replace(plan, device=device)
