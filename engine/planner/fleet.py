"""What is left of the nodes' memory while a plan is made.

Residents have their memory to themselves. Standby replicas share: on every GPU, always,

    sum(resident) + sum(standby asleep) + max(standby awake - standby asleep) <= room

and on every node the weights of all that sleep fit the host's memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.planner.hardware import Node
from engine.planner.memory import capacity
from engine.planner.select import Option

#: In place of a GPU's number: any of the node's.
ANY = -1
#: Nodes alike: kind, GPUs, RDMA.
Group = tuple[str, int, bool]


#: Owner by (node index, GPU index).
Homes = Mapping[tuple[int, int], str]


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
    #: Whose GPUs alone it may stand on; '' = those that nobody owns.
    home: str = ""

    @cached_property
    def standby(self) -> bool:
        """Whether it sleeps; all its options do, or none."""
        return any(option.sleep for options in self.options.values() for option in options)


@dataclass(frozen=True)
class Move:
    """An option on certain GPUs: (node index, GPU indices) for each of its nodes."""

    option: Option
    places: tuple[tuple[int, tuple[int, ...]], ...]


class Fleet:
    """Free bytes of every GPU and host, and which models stand where."""

    def __init__(
        self, nodes: Sequence[Node], utilisation: float, *, even: bool = False, homes: Homes | None = None
    ) -> None:
        """``even``: replicas are spread evenly instead of where it is fullest."""
        self.nodes = tuple(nodes)
        self.even = even
        #: Who owns which GPU; the others are nobody's.
        self.homes = homes or {}
        self.room = [capacity(node.kind, utilisation) for node in nodes]
        #: What no replica takes; of standby replicas the largest is counted awake, the others asleep.
        self.free = [[self.room[i]] * node.gpus for i, node in enumerate(nodes)]
        #: Per node, host memory that no sleeping weights take.
        self.host = [node.host_bytes for node in nodes]
        #: Per GPU, what each standby replica takes more awake than asleep, in rising order.
        self.waking: list[list[list[int]]] = [[[] for _ in range(node.gpus)] for node in nodes]
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

    def need(self, option: Option, node: int, gpu: int) -> int:
        """Bytes of this GPU that the option would take now."""
        if option.sleep is None:
            return option.footprint.total
        kept, waking = option.sleep.kept, self.waking[node][gpu]
        return kept + max(0, option.footprint.total - kept - (waking[-1] if waking else 0))

    def _take(self, option: Option, node: int, gpu: int, sign: int) -> None:
        if option.sleep is None:
            self.free[node][gpu] -= sign * option.footprint.total
            return
        waking, extra = self.waking[node][gpu], option.footprint.total - option.sleep.kept
        before = waking[-1] if waking else 0
        if sign > 0:
            insort(waking, extra)
        else:
            del waking[bisect_left(waking, extra)]
        after = waking[-1] if waking else 0
        self.free[node][gpu] -= sign * option.sleep.kept + after - before
        self.host[node] -= sign * option.sleep.host

    def _book(self, item: Item, move: Move, sign: int) -> None:
        for node, gpus in move.places:
            free = self.free[node]
            for gpu in gpus:
                self._take(move.option, node, gpu, sign)
                assert free[gpu] >= 0, "a GPU over its budget"
                self.hosts[node][item.model, gpu] += sign
            assert self.host[node] >= 0, "a host over its budget"
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
                situation: tuple[object, ...] = (*self.free[node], self._gpus_with(item.model, node))
                if self.homes:
                    situation = (*situation, *(self.is_home(item, node, g) for g in self._gpus(node)))
                if item.standby:
                    situation = (*situation, self.host[node], *map(tuple, self.waking[node]))
                distinct.setdefault(situation, node)
            for option in options:
                if option.nodes > 1:
                    yield from self._spread(item, option, members)
                    continue
                for node in distinct.values():
                    taken = self._gpus_with(item.model, node)
                    yield from self._within(item, option, node, every)
                    if taken and not every:
                        yield from self._within(item, option, node, every, without=taken)

    def _gpus_with(self, model: str, node: int) -> tuple[int, ...]:
        hosts = self.hosts[node]
        if not hosts[model, ANY]:
            return ()
        return tuple(gpu for gpu in range(self.nodes[node].gpus) if hosts[model, gpu])

    def _within(
        self, item: Item, option: Option, node: int, every: bool, without: tuple[int, ...] = ()
    ) -> Iterator[Move]:
        count = option.per_node
        if not self._sleeps(option, node):
            return
        # A sleeper goes where the fewest others wait for their turn, everybody else where it is fullest.
        emptiest = -1 if self.even else 1
        fitting = sorted(
            (self.turns(option, node, gpu), emptiest * bytes_, gpu)
            for gpu, bytes_ in enumerate(self.free[node])
            if bytes_ >= self.need(option, node, gpu) and gpu not in without and self.is_home(item, node, gpu)
        )
        seen = None
        for start in range(len(fitting) - count + 1):
            chosen = fitting[start : start + count]
            sizes = [(turns, bytes_) for turns, bytes_, _ in chosen]
            if sizes == seen:
                continue
            seen = sizes
            yield Move(option, ((node, tuple(sorted(gpu for _, _, gpu in chosen))),))
            if not every:
                return

    def turns(self, option: Option, node: int, gpu: int) -> int:
        """Bytes that standby replicas of this GPU take on waking, all together; 0 for a resident."""
        return sum(self.waking[node][gpu]) if option.sleep else 0

    def _sleeps(self, option: Option, node: int) -> bool:
        """Whether the node's host holds its weights asleep."""
        return option.sleep is None or option.sleep.host * option.per_node <= self.host[node]

    def is_home(self, item: Item, node: int, gpu: int) -> bool:
        """Whether it may stand there at all: on its owner's GPUs, or on those of nobody."""
        return self.homes.get((node, gpu), "") == item.home

    def _gpus(self, node: int) -> range:
        return range(self.nodes[node].gpus)

    def _spread(self, item: Item, option: Option, members: Sequence[int]) -> Iterator[Move]:
        fitting = sorted(
            (sum(self.free[n]), n)
            for n in members
            if self._sleeps(option, n)
            and all(
                free >= self.need(option, n, gpu) and self.is_home(item, n, gpu)
                for gpu, free in enumerate(self.free[n])
            )
        )
        if len(fitting) >= option.nodes:
            chosen = sorted(n for _, n in fitting[: option.nodes])
            yield Move(option, tuple((n, tuple(range(option.per_node))) for n in chosen))
