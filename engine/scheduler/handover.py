"""In which order new replicas start and the ones that they replace end, so that memory always suffices. Pure.

A new replica starts beside the one that it replaces, which goes once the new one is warm. Where memory does
not allow all of that at once, some wait for memory that comes back; where nothing else comes back, an old one
has to go before its successor starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.scheduler.plan import RunnerPlan
from engine.scheduler.seats import Rooms, Taken


@dataclass
class Handover:
    """``waits``: for each new replica, by id, the old ones that must be gone before it starts."""

    waits: dict[str, frozenset[str]] = field(default_factory=dict)
    #: Old ones that end at once though their successors are not ready: both do not fit.
    early: set[str] = field(default_factory=set)


def hand_over(
    kept: Sequence[RunnerPlan],
    new: Sequence[RunnerPlan],
    old: Mapping[str, RunnerPlan],
    successors: Mapping[str, Sequence[str]],
    rooms: Rooms,
) -> Handover:
    """The order, in rounds: all start that fit beside what is there; then the ones they replace are gone.

    Args:
        kept: replicas that stay.
        new: replicas to be started, in the order of their importance; with ``kept`` they fit.
        old: replicas to end, by id.
        successors: for each old one the new ones that must be ready before it ends; none = it ends at once.
        rooms: bytes of each device for runners.
    """
    order = Handover()
    taken = Taken.by(rooms, [*kept, *old.values()])
    pending = {plan.id: plan for plan in new}
    there = dict(old)
    gone: dict[str, RunnerPlan] = {}
    while pending:
        started = [plan for plan in pending.values() if _start(plan, taken, gone, order)]
        for plan in started:
            del pending[plan.id]
        leaving = [name for name in there if not any(one in pending for one in successors.get(name, ()))]
        if not started and not leaving and pending:
            leaving = _in_the_way(pending, there, successors)
            order.early.update(leaving)
        if not started and not leaving:
            # Not even an empty machine has room: the plan did not fit. Nothing is left to wait for.
            for name in pending:
                order.waits[name] = frozenset(gone)
            break
        for name in leaving:
            taken.remove(there[name])
            gone[name] = there.pop(name)
    return order


def _start(plan: RunnerPlan, taken: Taken, gone: Mapping[str, RunnerPlan], order: Handover) -> bool:
    if not taken.takes(plan):
        return False
    taken.add(plan)
    # Only those that were on its devices; the others' memory is none of its concern.
    devices = set(plan.devices)
    order.waits[plan.id] = frozenset(name for name, one in gone.items() if devices & set(one.devices))
    return True


def _in_the_way(
    pending: Mapping[str, RunnerPlan],
    there: Mapping[str, RunnerPlan],
    successors: Mapping[str, Sequence[str]],
) -> list[str]:
    """One old replica to end early: on the devices of the first that waits, its own predecessor rather."""
    plan = next(iter(pending.values()))
    near = [name for name, one in there.items() if set(one.devices) & set(plan.devices)]
    near.sort(key=lambda name: plan.id not in successors.get(name, ()))
    return near[:1]
