"""Gateway workers with changed settings: one after the other, the new one before the old one ends. Pure.

A worker with new settings accepts on the very socket of the one that it replaces, so no connection is refused
meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.scheduler.changes import Change
from engine.scheduler.replan import free_number
from engine.scheduler.units import GatewayPlan, Leaving


@dataclass
class Rolling:
    """The workers to be, those to end, and who waits for whom."""

    plans: list[GatewayPlan] = field(default_factory=list)
    leaving: dict[str, Leaving] = field(default_factory=dict)
    waits: dict[str, frozenset[str]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


def roll(
    old: Sequence[GatewayPlan],
    fresh: Sequence[GatewayPlan],
    going: Sequence[GatewayPlan] = (),
    reason: str = "changed settings",
) -> Rolling:
    """From the workers that live to those wanted.

    Args:
        old: workers that live or are about to.
        fresh: what is wanted; all alike but for their numbers.
        going: workers on their way out, whose names are not free yet.
        reason: why those that change do.
    """
    result = Rolling()
    print_ = fresh[0].fingerprint
    kept = [plan for plan in old if plan.fingerprint == print_][: len(fresh)]
    rest = [plan for plan in old if plan not in kept]
    names = {plan.id for plan in (*old, *going)}
    places = {plan.index for plan in (*kept, *going)}
    for plan in kept:
        result.plans.append(replace(fresh[0], id=plan.id, index=plan.index))
        result.changes.append(_change("kept", plan.id, plan.id, "unchanged"))
    before: str | None = None
    for pattern in fresh[len(kept) :]:
        name = f"gateway-{free_number('gateway', names)}"
        names.add(name)
        leaves = rest.pop(0) if rest else None
        index = (
            leaves.index if leaves else next(n for n in range(len(places) + len(old) + 1) if n not in places)
        )
        places.add(index)
        result.plans.append(replace(pattern, id=name, index=index))
        if leaves:
            result.leaving[leaves.id] = Leaving(f"replaced by {name}: {reason}", (name,))
            result.waits[name] = frozenset({before} if before else ())
            result.changes.append(_change("restarted", name, leaves.id, reason))
            before = leaves.id
        else:
            result.changes.append(_change("added", name, None, "more workers"))
    for plan in rest:
        result.leaving[plan.id] = Leaving("fewer gateway workers")
        result.changes.append(_change("removed", plan.id, plan.id, "fewer workers"))
    return result


def _change(kind: str, unit: str, was: str | None, reason: str) -> Change:
    return Change.model_validate(
        {"kind": kind, "model": "gateway", "unit": unit, "was": was, "reason": reason}
    )
