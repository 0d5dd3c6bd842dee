"""The third step: which of the possible moves is best, as a weighted sum of named scores from 0 to 1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol

from engine.planner.fleet import ANY, Fleet, Item, Move


class Scorer(Protocol):
    """One named wish."""

    name: ClassVar[str]
    weight: ClassVar[float]

    def score(self, item: Item, move: Move, fleet: Fleet) -> float:
        """0 (against) to 1 (for)."""


class Preferred:
    """The layout that selection put first: the fewest GPUs, in the better layout."""

    name: ClassVar[str] = "preferred layout"
    weight: ClassVar[float] = 4.0

    def score(self, item: Item, move: Move, fleet: Fleet) -> float:
        return 1.0 / (1 + move.option.rank)


class Tight:
    """Little is left beside it, so that large rooms stay for large models; in an even fleet the opposite."""

    name: ClassVar[str] = "tight"
    weight: ClassVar[float] = 2.0

    def score(self, item: Item, move: Move, fleet: Fleet) -> float:
        option = move.option
        left = room = 0
        for node, gpus in move.places:
            room += fleet.room[node] * len(gpus)
            left += sum(fleet.free[node][gpu] - fleet.need(option, node, gpu) for gpu in gpus)
        return left / room if fleet.even else 1.0 - left / room


class WholeNodes:
    """Nodes that already serve something are filled before an empty one is begun."""

    name: ClassVar[str] = "whole nodes"
    weight: ClassVar[float] = 1.0

    def score(self, item: Item, move: Move, fleet: Fleet) -> float:
        used = sum(min(fleet.free[node]) < fleet.room[node] for node, _ in move.places)
        return used / len(move.places)


class Apart:
    """Replicas of one model stand on different nodes, or at least GPUs: no fault takes all of them."""

    name: ClassVar[str] = "replicas apart"
    weight: ClassVar[float] = 3.5

    def score(self, item: Item, move: Move, fleet: Fleet) -> float:
        hosts, model = fleet.hosts, item.model
        if any(hosts[node][model, gpu] for node, gpus in move.places for gpu in gpus):
            return 0.0
        return 0.3 if any(hosts[node][model, ANY] for node, _ in move.places) else 1.0


class Turns:
    """Few others wait for the same memory, so that several standby models can be awake at once."""

    name: ClassVar[str] = "turns"
    weight: ClassVar[float] = 3.0

    def score(self, item: Item, move: Move, fleet: Fleet) -> float:
        if move.option.sleep is None:
            return 0.0
        waiting = room = 0
        for node, gpus in move.places:
            room += fleet.room[node] * len(gpus)
            waiting += sum(fleet.turns(move.option, node, gpu) for gpu in gpus)
        return 1.0 / (1.0 + waiting / room)


SCORERS: tuple[Scorer, ...] = (Preferred(), Tight(), WholeNodes(), Apart(), Turns())


def total(item: Item, move: Move, fleet: Fleet) -> float:
    """The weighted sum."""
    return sum(each.weight * each.score(item, move, fleet) for each in SCORERS)


def ranked(item: Item, moves: Iterable[Move], fleet: Fleet) -> list[Move]:
    """The moves, best first; equal ones in the order of their nodes and GPUs."""
    return sorted(moves, key=lambda move: (-total(item, move, fleet), move.places))
