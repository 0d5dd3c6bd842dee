"""All replicas onto all nodes: greedily, then, while something is left over, by a bounded search.

The aim, in this order: no replica of a higher priority gives way to a lower one; as much of the wanted memory
as possible stands. When everything fits at the first try nothing is searched.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.planner.fleet import Fleet, Item, Move
from engine.planner.score import ranked

#: Fixed, so that equal wishes give equal plans.
_SEED = 20_261_124
_MOST_REMOVED = 4
#: More replicas than these are beyond an exact search.
_MOST_BRANCHED = 64

Placed = dict[str, Move]


def pack(items: Sequence[Item], fleet: Fleet, steps: int) -> Placed:
    """Where each replica stands, by its id; what is missing did not fit.

    Args:
        items: the replicas; one without options is never placed.
        fleet: the nodes; changed to hold what is placed.
        steps: most trials of placing one replica after the greedy try; bounds the time.
    """
    order = sorted(
        (item for item in items if item.options), key=lambda item: (-item.priority, -item.value, item.id)
    )
    placed = _greedy(order, fleet)
    if len(placed) == len(order):
        return placed
    search = _Search(order, fleet, placed, steps)
    if search.branch(steps // 2):
        search.shake()
    return search.settle()


def _greedy(order: Iterable[Item], fleet: Fleet) -> Placed:
    placed: Placed = {}
    for item in order:
        moves = ranked(item, fleet.moves(item), fleet)
        if moves:
            fleet.apply(item, moves[0])
            placed[item.id] = moves[0]
    return placed


@dataclass
class _Search:
    order: list[Item]
    fleet: Fleet
    best: Placed
    steps: int
    levels: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.levels = sorted({item.priority for item in self.order}, reverse=True)
        self.by_id = {item.id: item for item in self.order}
        self.worth = self._worth(self.best)
        self.current = dict(self.best)

    def _worth(self, placed: Iterable[str]) -> list[int]:
        """Bytes placed at each priority, the highest first: compared as a list."""
        sums = dict.fromkeys(self.levels, 0)
        for name in placed:
            item = self.by_id[name]
            sums[item.priority] += item.value
        return [sums[level] for level in self.levels]

    def _clear(self) -> None:
        for name, move in self.current.items():
            self.fleet.undo(self.by_id[name], move)
        self.current = {}

    def _keep(self) -> bool:
        """Remembers the current placement when it is better; says whether nothing is left to better."""
        worth = self._worth(self.current)
        if worth > self.worth:
            self.best, self.worth = dict(self.current), worth
        return len(self.best) == len(self.order)

    def settle(self) -> Placed:
        """Puts the best placement onto the fleet."""
        self._clear()
        for name, move in self.best.items():
            self.fleet.apply(self.by_id[name], move)
        self.current = dict(self.best)
        return self.best

    def branch(self, budget: int) -> bool:
        """Depth first with a bound; True = the budget did not last, so there may be something better."""
        if len(self.order) > _MOST_BRANCHED:
            return True
        self._clear()
        self.budget = budget
        self._descend(0)
        return self.budget <= 0

    def _descend(self, depth: int) -> bool:
        """True = stop: all is placed, or the budget is spent."""
        if self._keep():
            return True
        if depth == len(self.order) or not self._hopeful(depth):
            return False
        item = self.order[depth]
        for move in ranked(item, self.fleet.moves(item, every=True), self.fleet):
            if self.budget <= 0:
                return True
            self.budget -= 1
            self.steps -= 1
            self.fleet.apply(item, move)
            self.current[item.id] = move
            stop = self._descend(depth + 1)
            del self.current[item.id]
            self.fleet.undo(item, move)
            if stop:
                return True
        return self._descend(depth + 1)

    def _hopeful(self, depth: int) -> bool:
        """Whether the rest could still make it better, if memory were all in one piece."""
        # Standby replicas share memory: then the sum of what is free bounds nothing.
        shared = any(item.standby for item in self.order)
        room = sum(item.value for item in self.order) if shared else self.fleet.free_bytes
        most = self._worth(self.current)
        for i, level in enumerate(self.levels):
            rest = sum(item.value for item in self.order[depth:] if item.priority == level)
            gain = min(rest, room)
            most[i] += gain
            room -= gain
        return most > self.worth

    def shake(self) -> None:
        """Takes some replicas away and places those left over first, again and again from the best."""
        dice = random.Random(_SEED)
        while self.steps > 0 and len(self.best) < len(self.order):
            self.settle()
            self.steps -= len(self.best) // 4  # setting up anew takes its time too
            for name in dice.sample(sorted(self.best), min(len(self.best), dice.randint(1, _MOST_REMOVED))):
                self.fleet.undo(self.by_id[name], self.current.pop(name))
            left = [item for item in self.order if item.id not in self.current]
            left.sort(key=lambda item: (-item.priority, -item.value * dice.uniform(0.5, 1.5)))
            for item in left:
                moves = ranked(item, self.fleet.moves(item, every=True), self.fleet)
                self.steps -= 1 + len(moves)
                if moves:
                    move = moves[0] if dice.random() < 0.8 else dice.choice(moves)
                    self.fleet.apply(item, move)
                    self.current[item.id] = move
            worth = self._worth(self.current)
            if worth >= self.worth:  # equals too: another arrangement may leave a better hole
                self.best, self.worth = dict(self.current), worth
