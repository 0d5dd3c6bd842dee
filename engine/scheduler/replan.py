"""From the replicas that stand to those that are wanted, by the smallest number of moves. Pure.

A replica whose specification is unchanged keeps its id, its device and its process. One that is changed or
moved gets a new id, so that its socket is another one and both can live until the new one is warm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.scheduler.changes import Change, differences, live_differences
from engine.scheduler.handover import hand_over
from engine.scheduler.plan import RunnerPlan, gib, spec_fingerprint
from engine.scheduler.seats import Rooms, Seeker, Taken, candidates, elsewhere, seat
from engine.scheduler.units import Leaving


@dataclass(frozen=True)
class Stood:
    """A replica of the old plan."""

    plan: RunnerPlan
    #: It answers requests (or sleeps), so its successor is waited for.
    serves: bool = True
    #: It has a process, which holds its memory.
    started: bool = True


@dataclass
class Replan:
    """What is wanted from now on, and how to come there."""

    #: In the order of the new configuration; those that stay under their old ids.
    runners: list[RunnerPlan] = field(default_factory=list)
    leaving: dict[str, Leaving] = field(default_factory=dict)
    #: For new replicas the old ones that must be gone before they start.
    waits: dict[str, frozenset[str]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    @property
    def moves(self) -> int:
        """Replicas that leave their device though nothing about them has changed."""
        return sum(change.kind == "moved" for change in self.changes)


@dataclass
class _Slot:
    """One replica to be, with the old one that it is or follows."""

    fresh: RunnerPlan
    same: Stood | None = None
    before: Stood | None = None
    plan: RunnerPlan | None = None


def essence(plan: RunnerPlan) -> str:
    """A hash of what a replica is, apart from its id and place: equal ones need no restart."""
    ranks = plan.device.count(",")
    return f"{spec_fingerprint(plan.spec, plan.entry, ('socket', 'device', 'model_dir'))}-{ranks}"


def replan(
    old: Sequence[Stood],
    fresh: Sequence[RunnerPlan],
    rooms: Rooms,
    going: Sequence[RunnerPlan] = (),
    *,
    former: Sequence[RunnerPlan] = (),
    kinds: Mapping[str, str] | None = None,
) -> Replan:
    """The new plan with the fewest moves.

    Replicas beyond a model's fewest (added under load) stay, or are started anew with changed settings, up to
    its most and as long as they fit where they are: nothing is moved for them.

    Args:
        old: what stands, or is about to.
        fresh: the fewest replicas of every model, as a plan from nothing places them; they fit.
        rooms: bytes of each device for runners.
        going: replicas that are on their way out already, and still hold their memory and their ids.

        former: what the last plan from nothing had for models about which nothing has changed. A plan from
            nothing may lay them out in another way, to suit its neighbours; as long as all fit without that,
            they stay as they were.
        kinds: product and owner of each device, where they differ.

    Raises:
        PlanError: a socket's path would be too long.
    """
    if former and (found := _replan(old, _as_before(fresh, former), rooms, going, kinds)):
        return found
    found = _replan(old, fresh, rooms, going, kinds, settle=True)
    assert found is not None, "a plan from nothing is a way"
    return found


def _as_before(fresh: Sequence[RunnerPlan], former: Sequence[RunnerPlan]) -> list[RunnerPlan]:
    by_id = {plan.id: plan for plan in former}
    return [by_id.get(plan.id, plan) for plan in fresh]


def _replan(
    old: Sequence[Stood],
    fresh: Sequence[RunnerPlan],
    rooms: Rooms,
    going: Sequence[RunnerPlan],
    kinds: Mapping[str, str] | None,
    *,
    settle: bool = False,
) -> Replan | None:
    """One try; ``settle``: where no way is found, all are placed as ``fresh`` has them."""
    left = list(old)
    slots = _matched(fresh, left)
    extras = _extras(slots, old, left)
    _follow(slots, left)
    _follow(extras, left)
    places = seat([_seeker(slot, kinds or {}) for slot in slots], rooms, kinds)
    if places is None:
        if not settle:
            return None
        places = [slot.fresh.device for slot in slots]
    names = _Names(plan.id for plan in (*(one.plan for one in old), *going))
    taken = Taken(rooms, kinds=kinds or {})
    for slot, device in zip(slots, places, strict=True):
        _settle(slot, device, names)
        taken.add(_plan(slot))
    for slot in extras:
        spare = _spare_place(slot, taken)
        if spare is None:
            left += [one for one in (slot.same, slot.before) if one]
        else:
            _settle(slot, spare, names)
            taken.add(_plan(slot))
    stay = [slot for slot in _in_order(slots, extras) if slot.plan]
    return _result(stay, left, rooms, going)


def _matched(fresh: Sequence[RunnerPlan], left: list[Stood]) -> list[_Slot]:
    """A slot for each, with the old replica that is just like it; such are taken out of ``left``."""
    slots = [_Slot(plan) for plan in fresh]
    for slot in slots:
        slot.same = _take_same(slot.fresh, left, here=True)
    for slot in slots:
        slot.same = slot.same or _take_same(slot.fresh, left, here=False)
    return slots


def _take_same(plan: RunnerPlan, left: list[Stood], *, here: bool) -> Stood | None:
    kind = essence(plan)
    same = [
        one
        for one in left
        if one.plan.family == plan.family
        and (one.plan.device == plan.device or not here)
        and essence(one.plan) == kind
    ]
    same.sort(key=lambda one: (not one.serves, _number(one.plan.id)))
    if not same:
        return None
    left.remove(same[0])
    return same[0]


def _extras(slots: Sequence[_Slot], old: Sequence[Stood], left: list[Stood]) -> list[_Slot]:
    """Slots for replicas beyond the fewest: as many as there are now and may be."""
    extras = []
    last = {slot.fresh.family: slot.fresh for slot in slots}
    for family, plan in last.items():
        fewest = sum(slot.fresh.family == family for slot in slots)
        now = sum(one.plan.family == family and one.serves for one in old)
        for _ in range(min(plan.standing.max_replicas, now) - fewest):
            slot = _Slot(plan)
            slot.same = _take_same(plan, left, here=True) or _take_same(plan, left, here=False)
            extras.append(slot)
    return extras


def _follow(slots: Iterable[_Slot], left: list[Stood]) -> None:
    """Gives each slot without a replica one of the same model to follow, those that serve first."""
    for slot in slots:
        if slot.same is None:
            found = [one for one in left if one.plan.family == slot.fresh.family]
            found.sort(key=lambda one: (not one.serves, _number(one.plan.id)))
            if found:
                slot.before = found[0]
                left.remove(found[0])


def _seeker(slot: _Slot, kinds: Mapping[str, str]) -> Seeker:
    same, before = slot.same, slot.before
    at = same.plan.device if same and _is_home(slot.fresh, same.plan, kinds) else None
    return Seeker(slot.fresh, at, before.plan.device if before else None)


def _is_home(fresh: RunnerPlan, stands: RunnerPlan, kinds: Mapping[str, str]) -> bool:
    """Whether one that stands may stay there: GPUs may have got an owner since, or lost it."""
    return {kinds.get(device) for device in stands.devices} == {kinds.get(fresh.devices[0])}


def _spare_place(slot: _Slot, taken: Taken) -> str | None:
    """Where an extra replica may be: where it stands, or (one to be started anyway) where there is room."""
    if slot.same:
        stays = _is_home(slot.fresh, slot.same.plan, taken.kinds)
        places: Iterable[str] = [slot.same.plan.device] if stays else []
    else:
        near = [slot.before.plan.device] if slot.before else []
        places = candidates(slot.fresh, taken, near)
    return next((one for one in places if taken.takes(elsewhere(slot.fresh, slot.fresh.id, one))), None)


def _settle(slot: _Slot, device: str, names: _Names) -> None:
    stays = slot.same is not None and slot.same.plan.device == device
    unit = slot.same.plan.id if slot.same and stays else names.next(slot.fresh.family)
    slot.plan = elsewhere(slot.fresh, unit, device)


def _plan(slot: _Slot) -> RunnerPlan:
    assert slot.plan is not None, "only settled slots have a plan"
    return slot.plan


def _in_order(slots: Sequence[_Slot], extras: Sequence[_Slot]) -> list[_Slot]:
    """All slots, those of one model and owner beside each other."""
    families = dict.fromkeys(slot.fresh.family for slot in slots)
    return [slot for family in families for slot in (*slots, *extras) if slot.fresh.family == family]


class _Names:
    """Unit ids that are not in use."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def next(self, family: str) -> str:
        name = free_name(family, self._taken)
        self._taken.add(name)
        return name


def free_name(family: str, taken: Collection[str]) -> str:
    """``<family>-<n>`` with the lowest n that is not taken."""
    return f"{family}-{free_number(family, taken)}"


def free_number(prefix: str, taken: Collection[str]) -> int:
    """The lowest n from 0 so that ``<prefix>-<n>`` is not taken."""
    return next(n for n in range(len(taken) + 1) if f"{prefix}-{n}" not in taken)


def _number(unit: str) -> int:
    number = unit.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _result(
    slots: Sequence[_Slot], left: Sequence[Stood], rooms: Rooms, going: Sequence[RunnerPlan]
) -> Replan:
    result = Replan(runners=[_plan(slot) for slot in slots])
    kept = {one.plan.id: one for slot in slots if (one := slot.same) and one.plan.id == _plan(slot).id}
    goers = {stood.plan.id: stood for stood in left}
    heirs: dict[str, tuple[str, ...]] = {}
    for stood in left:
        # Those of its model that are yet to become ready: it need not go before them.
        heirs[stood.plan.id] = tuple(
            plan.id
            for plan in result.runners
            if plan.family == stood.plan.family and not (plan.id in kept and kept[plan.id].serves)
        )
    for slot in slots:
        gone = slot.same or slot.before
        if gone and gone.plan.id not in kept:
            goers[gone.plan.id] = gone
            heirs[gone.plan.id] = (_plan(slot).id,)
    started = {name for name, stood in kept.items() if stood.started}
    order = hand_over(
        [plan for plan in result.runners if plan.id in started],
        [plan for plan in result.runners if plan.id not in started],
        {name: stood.plan for name, stood in goers.items()} | {plan.id: plan for plan in going},
        # One that never answered is not waited for.
        {name: units for name, units in heirs.items() if goers[name].serves},
        rooms,
    )
    result.waits = order.waits
    result.changes = [_change(slot, order.early) for slot in slots]
    wanted = {plan.family for plan in result.runners}
    result.changes += [_removal(stood.plan, wanted) for stood in left]
    for name, units in heirs.items():
        waits = goers[name].serves and name not in order.early
        reason = f"replaced by {', '.join(units)}" if units else _why_removed(goers[name].plan, wanted)
        result.leaving[name] = Leaving(reason, units if waits else ())
    return result


def _why_removed(plan: RunnerPlan, wanted: set[str]) -> str:
    return "fewer replicas" if plan.family in wanted else "no longer asked for"


def _removal(plan: RunnerPlan, wanted: set[str]) -> Change:
    return Change(
        kind="removed",
        model=plan.model,
        unit=plan.id,
        was=plan.id,
        device=plan.device,
        was_device=plan.device,
        reason=_why_removed(plan, wanted),
    )


def _change(slot: _Slot, early: set[str]) -> Change:
    plan, gone = _plan(slot), slot.same or slot.before
    if gone is None:
        return Change(kind="added", model=plan.model, unit=plan.id, device=plan.device, reason="new")
    common = {
        "model": plan.model,
        "unit": plan.id,
        "device": plan.device,
        "was": gone.plan.id,
        "was_device": gone.plan.device,
    }
    if gone.plan.id == plan.id:
        live = live_differences(gone.plan, plan)
        return Change(
            kind="kept", reason="; ".join(live) + " (no restart)" if live else "unchanged", **common
        )
    reasons = [] if slot.same else differences(gone.plan, plan)
    if gone.plan.device != plan.device:
        reasons.append(f"{gone.plan.device} → {plan.device}" + (" to make room" if slot.same else ""))
    old_first = gone.plan.id in early
    if old_first:
        size = gib(plan.awake_bytes)
        reasons.append(f"{gone.plan.id} ends first: no room for both (needs {size} more)")
    return Change(
        kind="moved" if slot.same else "changed",
        reason="; ".join(reasons) or "started with other settings",
        old_first=old_first,
        **common,
    )


def standing(
    fresh: Sequence[RunnerPlan], records: Iterable[tuple[str, str, str]], serves: Mapping[str, bool]
) -> list[Stood]:
    """The recorded replicas that a plan from nothing would start just so, but for id and place.

    Args:
        fresh: the plan.
        records: unit id, device and fingerprint of each living replica.
        serves: whether it is ready or asleep, by unit id.
    """
    shapes: dict[str, dict[str, RunnerPlan]] = {}
    for plan in fresh:
        shapes.setdefault(plan.family, {})[essence(plan)] = plan
    found = []
    for unit, device, print_ in records:
        # An owned replica's owner is part of its id, so nobody is taken for another's.
        for plan in shapes.get(unit.rpartition("-")[0], {}).values():
            same = elsewhere(plan, unit, device)
            if device and same.fingerprint == print_ and len(same.devices) == len(plan.devices):
                found.append(Stood(same, serves.get(unit, True)))
                break
    return found
