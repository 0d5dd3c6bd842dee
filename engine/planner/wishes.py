"""Wants with the ways in which each could stand: filter and select, for every kind of node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.planner.fleet import Fleet, Group, Item
from engine.planner.layout import Policy, Want
from engine.planner.needs import ModelNeeds
from engine.planner.select import Choice, options


@dataclass(frozen=True)
class Prepared:
    """Wishes with their options: what ``pack`` works on, and what the reasons are told from."""

    items: tuple[Item, ...]
    wants: dict[str, Want]
    choices: dict[str, dict[Group, Choice]]
    #: Replicas that load may ask for: nothing is refused for want of room for them.
    spare: tuple[Item, ...] = ()


def prepare(needs: Mapping[str, ModelNeeds], wants: Sequence[Want], fleet: Fleet, policy: Policy) -> Prepared:
    """Filters and selects for every want on every group of nodes."""
    items: list[Item] = []
    spare: list[Item] = []
    by_id: dict[str, Want] = {}
    choices: dict[str, dict[Group, Choice]] = {}
    counts: Counter[str] = Counter()
    for want in wants:
        found = choices_for(needs.get(want.model), want, fleet, policy)
        possible = {group: choice.options for group, choice in found.items() if choice.options}
        value = min((o.total for each in possible.values() for o in each), default=0)
        for number in range(max(want.replicas, want.most)):
            name = f"{want.family}-{counts[want.family]}"
            counts[want.family] += 1
            (items if number < want.replicas else spare).append(
                Item(name, want.model, want.priority, possible, value, want.home)
            )
            by_id[name], choices[name] = want, found
    return Prepared(tuple(items), by_id, choices, tuple(spare))


def choices_for(needs: ModelNeeds | None, want: Want, fleet: Fleet, policy: Policy) -> dict[Group, Choice]:
    """The options on each group of nodes; a model that nothing is known of has none."""
    if needs is None:
        reason = ("known figures", f"nothing is known of '{want.model}'; it is not in the catalog")
        return {group: Choice((), (reason,)) for group in fleet.groups}
    return {
        group: options(needs, want, fleet.nodes[members[0]], len(members), policy)
        for group, members in fleet.groups.items()
    }
