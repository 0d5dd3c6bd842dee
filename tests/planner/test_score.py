"""Each score by itself."""

from __future__ import annotations

import pytest

from engine.planner.fleet import Fleet, Item, Move, group_of
from engine.planner.hardware import parse_nodes
from engine.planner.memory import GIB
from engine.planner.score import SCORERS, Apart, Preferred, Tight, WholeNodes, ranked
from tests.planner.support import option


def fleet(text: str = "2x2xH200") -> Fleet:
    return Fleet(parse_nodes(text), 0.92)


def item(name: str = "a", gib: float = 10, model: str = "") -> Item:
    one = option(gib)
    return Item(name, model or name, 0, {group_of(n): (one,) for n in parse_nodes("1x2xH200")}, one.total)


def at(node: int, gpu: int, gib: float = 10, rank: int = 0) -> Move:
    return Move(option(gib, rank=rank), ((node, (gpu,)),))


def test_the_first_layout_is_preferred() -> None:
    scores = [Preferred().score(item(), at(0, 0, rank=rank), fleet()) for rank in range(3)]
    assert scores == [1, 1 / 2, 1 / 3]


def test_tight_is_one_where_nothing_is_left() -> None:
    nodes = fleet()
    exact = nodes.room[0] / GIB
    assert Tight().score(item(), at(0, 0, exact), nodes) == pytest.approx(1, abs=1e-6)
    assert Tight().score(item(), at(0, 0, exact / 4), nodes) == pytest.approx(0.25, abs=1e-6)


def test_used_nodes_are_filled_first() -> None:
    nodes = fleet()
    nodes.apply(item(), at(1, 0))
    assert WholeNodes().score(item("b"), at(1, 1), nodes) == 1
    assert WholeNodes().score(item("b"), at(0, 1), nodes) == 0


def test_replicas_of_a_model_keep_apart() -> None:
    nodes = fleet()
    nodes.apply(item("m-0", model="m"), at(0, 0))
    assert Apart().score(item("m-1", model="m"), at(0, 0), nodes) == 0
    assert 0 < Apart().score(item("m-1", model="m"), at(0, 1), nodes) < 1
    assert Apart().score(item("m-1", model="m"), at(1, 1), nodes) == 1
    assert Apart().score(item("n-0", model="n"), at(0, 1), nodes) == 1


def test_the_best_move_shares_a_used_gpu_but_not_with_its_own_replica() -> None:
    nodes = fleet()
    nodes.apply(item("m-0", model="m"), at(0, 0))
    other, replica = item("n-0", model="n"), item("m-1", model="m")
    assert ranked(other, nodes.moves(other), nodes)[0].places == ((0, (0,)),)
    assert ranked(replica, nodes.moves(replica), nodes)[0].places[0][0] == 1


def test_scores_are_named_and_between_nought_and_one() -> None:
    nodes = fleet()
    nodes.apply(item(), at(0, 0))
    assert len({each.name for each in SCORERS}) == len(SCORERS)
    for each in SCORERS:
        assert each.weight > 0
        for move in (at(0, 0), at(0, 1), at(1, 0)):
            assert 0 <= each.score(item("b"), move, nodes) <= 1
