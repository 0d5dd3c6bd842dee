"""What is left of the nodes' memory while a plan is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.planner.hardware import Node
from engine.planner.memory import capacity
from engine.planner.select import Option

#: In place of a GPU's number: any of the node's.
ANY = -1
#: Nodes alike: kind, GPUs, RDMA.
Group = tuple[str, int, bool]


def group_of(node: Node) -> Group:
    return node.kind.name, node.gpus, node.rdma


@dataclass(frozen=True)
class Item:
    """One replica to place."""

    id: str
    model: str
    priority: int
    #: Per group of nodes, the options there, best first.
    options: dict[Group, tuple[Option, ...]]
    #: Least memory in all that any option takes, bytes: what placing it is worth.
    value: int


@dataclass(frozen=True)
class Move:
    """An option on certain GPUs: (node index, GPU indices) for each of its nodes."""

    option: Option
    places: tuple[tuple[int, tuple[int, ...]], ...]


class Fleet:
    """Free bytes of every GPU, and which models stand where."""

    def __init__(self, nodes: Sequence[Node], utilisation: float) -> None:
        self.nodes = tuple(nodes)
        self.room = [capacity(node.kind, utilisation) for node in nodes]
        self.free = [[self.room[i]] * node.gpus for i, node in enumerate(nodes)]
        #: Per node, how often a model stands on each GPU: (model, GPU) -> replicas, and (model, -1) for any.
        self.hosts: list[Counter[tuple[str, int]]] = [Counter() for _ in nodes]
        self.groups: dict[Group, list[int]] = {}
        for i, node in enumerate(nodes):
            self.groups.setdefault(group_of(node), []).append(i)

    @property
    def free_bytes(self) -> int:
        return sum(map(sum, self.free))

    def apply(self, item: Item, move: Move) -> None:
        """Takes the memory; it must be there."""
        self._book(item, move, 1)

    def undo(self, item: Item, move: Move) -> None:
        """Gives back what ``apply`` took."""
        self._book(item, move, -1)

    def _book(self, item: Item, move: Move, sign: int) -> None:
        need = move.option.footprint.total * sign
        for node, gpus in move.places:
            free = self.free[node]
            for gpu in gpus:
                free[gpu] -= need
                assert free[gpu] >= 0, "a GPU over its budget"
                self.hosts[node][item.model, gpu] += sign
            self.hosts[node][item.model, ANY] += sign

    def moves(self, item: Item, *, every: bool = False) -> Iterator[Move]:
        """Where the item can stand now: on each kind of node situation once, on the fullest GPUs that do
        (and, beside a replica of the same model, on the fullest others).

        Args:
            item: what to place.
            every: also on emptier GPUs of a node, each distinct choice once.
        """
        for group, options in item.options.items():
            members = self.groups.get(group, ())
            distinct: dict[tuple[object, ...], int] = {}
            for node in members:
                distinct.setdefault((*self.free[node], self._gpus_with(item.model, node)), node)
            for option in options:
                if option.nodes > 1:
                    yield from self._spread(option, members)
                    continue
                for node in distinct.values():
                    taken = self._gpus_with(item.model, node)
                    yield from self._within(option, node, every)
                    if taken and not every:
                        yield from self._within(option, node, every, without=taken)

    def _gpus_with(self, model: str, node: int) -> tuple[int, ...]:
        hosts = self.hosts[node]
        if not hosts[model, ANY]:
            return ()
        return tuple(gpu for gpu in range(self.nodes[node].gpus) if hosts[model, gpu])

    def _within(
        self, option: Option, node: int, every: bool, without: tuple[int, ...] = ()
    ) -> Iterator[Move]:
        need, count = option.footprint.total, option.per_node
        free = self.free[node]
        fitting = sorted(
            (bytes_, gpu) for gpu, bytes_ in enumerate(free) if bytes_ >= need and gpu not in without
        )
        seen = None
        for start in range(len(fitting) - count + 1):
            chosen = fitting[start : start + count]
            sizes = [bytes_ for bytes_, _ in chosen]
            if sizes == seen:
                continue
            seen = sizes
            yield Move(option, ((node, tuple(sorted(gpu for _, gpu in chosen))),))
            if not every:
                return

    def _spread(self, option: Option, members: Sequence[int]) -> Iterator[Move]:
        need = option.footprint.total
        fitting = sorted((sum(self.free[n]), n) for n in members if min(self.free[n]) >= need)
        if len(fitting) >= option.nodes:
            chosen = sorted(n for _, n in fitting[: option.nodes])
            yield Move(option, tuple((n, tuple(range(option.per_node))) for n in chosen))
