"""Packing: nothing over budget, priorities kept, and close to what can be placed at all."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.planner.fleet import Fleet, Item, group_of
from engine.planner.hardware import parse_nodes
from engine.planner.memory import GIB
from engine.planner.pack import pack
from tests.planner.support import option

NODES = parse_nodes("2x2xH100,1x2xL40S")


def item(number: int, gib: float, priority: int = 0, gpus: int = 1) -> Item:
    groups = {group_of(n) for n in NODES}
    one = option(gib, gpus)
    return Item(f"i{number}", f"m{number}", priority, dict.fromkeys(groups, (one,)), one.total)


wishes = st.lists(
    st.tuples(st.floats(1, 75), st.integers(0, 2), st.sampled_from([1, 2])), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(wishes)
def test_no_gpu_is_over_budget_and_what_is_placed_is_booked(sizes: list[tuple[float, int, int]]) -> None:
    items = [item(i, gib, priority, gpus) for i, (gib, priority, gpus) in enumerate(sizes)]
    fleet = Fleet(NODES, 0.92)
    placed = pack(items, fleet, 300)
    expected = [[room] * n.gpus for room, n in zip(fleet.room, NODES, strict=True)]
    for move in placed.values():
        for node, gpus in move.places:
            for gpu in gpus:
                expected[node][gpu] -= move.option.footprint.total
    assert fleet.free == expected
    assert all(free >= 0 for node in fleet.free for free in node)


@settings(max_examples=30, deadline=None)
@given(wishes)
def test_equal_wishes_give_equal_placements(sizes: list[tuple[float, int, int]]) -> None:
    items = [item(i, gib, priority, gpus) for i, (gib, priority, gpus) in enumerate(sizes)]
    assert pack(items, Fleet(NODES, 0.92), 200) == pack(items, Fleet(NODES, 0.92), 200)


def test_a_lower_priority_never_takes_the_place_of_a_higher() -> None:
    items = [item(0, 72, priority=0), item(1, 40, priority=1), item(2, 72), item(3, 72), item(4, 72)]
    fleet = Fleet(parse_nodes("1x2xH100"), 0.92)
    placed = pack(items, fleet, 2000)
    assert "i1" in placed and len(placed) == 2


def test_search_finds_what_greed_misses() -> None:
    # Two GPUs of 72.8 GiB; largest first leaves 24 and 24.3 GiB for what needs 36.
    sizes = [36.4, 36.4, 24.2, 24.2, 24.2]
    fleet = Fleet(parse_nodes("1x2xH100"), 0.92)
    placed = pack([item(i, gib) for i, gib in enumerate(sizes)], fleet, 5000)
    assert len(placed) == 5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(10, 60), min_size=4, max_size=7))
def test_as_much_as_can_be_is_placed_on_two_gpus(sizes: list[int]) -> None:
    fleet = Fleet(parse_nodes("1x2xH100"), 0.92)
    room = fleet.room[0]
    placed = pack([item(i, gib) for i, gib in enumerate(sizes)], fleet, 20_000)
    best = 0
    for where in itertools.product((None, 0, 1), repeat=len(sizes)):
        loads = [sum(s * GIB for s, w in zip(sizes, where, strict=True) if w == gpu) for gpu in (0, 1)]
        if max(loads) <= room:
            best = max(best, sum(loads))
    assert sum(move.option.total for move in placed.values()) == best
