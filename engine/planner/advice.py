"""Why a replica has no place, and the smallest change that would give it one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from engine.planner.asleep import sleep_of
from engine.planner.filters import FILTERS
from engine.planner.fleet import Fleet, Group, Item, Move
from engine.planner.hardware import KINDS, Node
from engine.planner.layout import Policy, Want
from engine.planner.memory import GIB, capacity, context_of
from engine.planner.needs import ModelNeeds
from engine.planner.outcome import Refusal
from engine.planner.rules import eplb_reason
from engine.planner.wishes import Prepared, choices_for

#: Contexts below this are no help to anybody.
LEAST_CONTEXT = 2048
_MOST_NODES = 4
#: Most standing replicas (and nodes) that are taken away for a try.
_MOST_TRIED = 16


def refuse(
    item: Item,
    prepared: Prepared,
    placed: Mapping[str, Move],
    fleet: Fleet,
    needs: Mapping[str, ModelNeeds],
    policy: Policy,
) -> Refusal:
    """The reason and the change for one replica, with everything else standing where ``placed`` says."""
    want, model = prepared.wants[item.id], needs.get(item.model)
    room = _after(prepared, placed, fleet)
    if item.options and _wants_host(item, room):
        step, reason = "host memory", _no_host(item, prepared, placed, room)
    elif item.options:
        step, reason = "room", _no_room(item, prepared, placed, room)
    else:
        step, reason = _nearest(prepared, item)
    change = ""
    if model is not None:
        helpers = _Helper(needs, want, item, prepared, placed, room, policy)
        change = next(helpers.changes(), "")
    elif step == "known figures":
        change = "Add an entry to models/catalog/."
    return Refusal(item.id, item.model, step, reason, change)


def _after(prepared: Prepared, placed: Mapping[str, Move], fleet: Fleet) -> Fleet:
    """A fleet with the placed replicas at what they asked for, their caches not grown."""
    fresh = _emptied(fleet)
    by_id = {item.id: item for item in prepared.items}
    for name, move in placed.items():
        fresh.apply(by_id[name], move)
    return fresh


def _emptied(fleet: Fleet) -> Fleet:
    fresh = Fleet(fleet.nodes, 1.0, homes=fleet.homes)
    fresh.room = list(fleet.room)
    fresh.free = [[room] * node.gpus for room, node in zip(fleet.room, fleet.nodes, strict=True)]
    return fresh


def _nearest(prepared: Prepared, item: Item) -> tuple[str, str]:
    """The reason of the layout that came nearest: the one refused by the latest filter."""
    order = {each.name: i for i, each in enumerate(FILTERS)}
    reasons = [pair for choice in prepared.choices[item.id].values() for pair in choice.reasons]
    telling = [pair for pair in reasons if pair[0] in ("EPLB", "context")]
    return max(
        telling or reasons, key=lambda pair: order.get(pair[0], 0), default=("nodes", "there are no GPUs")
    )


def _wants_host(item: Item, room: Fleet) -> bool:
    """Whether nothing but the host's memory keeps it out."""
    if not item.standby:
        return False
    before, room.host = room.host, [sys.maxsize] * len(room.host)
    fits = next(room.moves(item), None) is not None
    room.host = before
    return fits


def _no_host(item: Item, prepared: Prepared, placed: Mapping[str, Move], room: Fleet) -> str:
    free, node = max((free, -i) for i, free in enumerate(room.host))
    asleep = [
        name for name, move in placed.items() if move.option.sleep and any(n == -node for n, _ in move.places)
    ]
    after = f" after {', '.join(asleep)}" if asleep else ""
    return (
        f"asleep, its weights take {_weights_asleep(item) / GIB:.1f} GiB of the host's memory; "
        f"{room.nodes[-node].name} has {free / GIB:.1f} GiB of {room.nodes[-node].host_bytes / GIB:.1f} left "
        f"for that{after}"
    )


def _weights_asleep(item: Item) -> int:
    """The least bytes of one host that any of its layouts takes asleep."""
    return min(o.sleep.host * o.per_node for each in item.options.values() for o in each if o.sleep)


def _no_room(item: Item, prepared: Prepared, placed: Mapping[str, Move], room: Fleet) -> str:
    option = min((o for each in item.options.values() for o in each), key=lambda o: o.total)
    need = f"{option.footprint.total / GIB:.1f} GiB"
    if option.sleep:
        need += f" awake ({option.sleep.kept / GIB:.1f} asleep)"
    spots = [
        (free, -node, -gpu)
        for node, each in enumerate(room.free)
        for gpu, free in enumerate(each)
        if room.is_home(item, node, gpu)
    ]
    if not spots:
        return f"needs {need}, and every GPU is owned by others"
    free, node, gpu = max(spots)
    node, gpu = -node, -gpu
    standing = [
        name for name, move in placed.items() if any(n == node and gpu in gpus for n, gpus in move.places)
    ]
    after = f" after {', '.join(standing)}" if standing else ""
    where = f"{room.nodes[node].name}:gpu{gpu}"
    of = (
        "one GPU"
        if option.layout.gpus == 1
        else f"each of {option.layout.gpus} GPUs ({option.layout.name()})"
    )
    which = f"the emptiest of {item.home}'s, {where}," if item.home else f"the emptiest, {where},"
    return f"needs {need} of {of}; {which} has {free / GIB:.1f} GiB free{after}"


class _Helper:
    """Tries changes from the smallest on."""

    def __init__(
        self,
        needs: Mapping[str, ModelNeeds],
        want: Want,
        item: Item,
        prepared: Prepared,
        placed: Mapping[str, Move],
        room: Fleet,
        policy: Policy,
    ) -> None:
        self.every, self.needs, self.want, self.item = needs, needs[want.model], want, item
        self.prepared, self.placed, self.room, self.policy = prepared, placed, room, policy
        self._items: dict[tuple[Want, tuple[tuple[Group, int], ...]], Item] = {}

    def changes(self) -> Iterator[str]:
        """Sentences, the smallest change first."""
        fixed = self.needs.engine == "vllm" and self.want.memory_bytes is not None
        unknown = [] if fixed else self.needs.unknown()
        if unknown:
            yield f"Add {', '.join(unknown)} to its entry in models/catalog/, with the source."
            return
        if not self.room.nodes:
            yield "Name nodes with GPUs."
            return
        if self.want.eplb and eplb_reason(self.needs, 2) is not None:
            yield "Leave EPLB out for this model (`eplb = false`)."
        most = self.needs.context
        if self.want.context and most and self.want.context > most:
            yield f"Ask for at most {most} tokens of context."
        yield from self._less()
        yield from self._other_tier()
        yield from self._shorter()
        yield from self._more_host()
        yield from self._others()
        more = [*self._more_nodes(), *self._other_gpus()]
        if more:
            yield f"It fits with {', or '.join(more)}."

    def _fits(self, want: Want, room: Fleet | None = None) -> bool:
        room = room or self.room
        key = want, tuple((group, len(members)) for group, members in room.groups.items())
        if key not in self._items:
            found = choices_for(self.needs, want, room, self.policy)
            possible = {group: choice.options for group, choice in found.items() if choice.options}
            self._items[key] = replace(self.item, options=possible)
        return next(room.moves(self._items[key]), None) is not None

    def _less(self) -> Iterator[str]:
        if self.want.memory_bytes is not None:
            lower = replace(self.want, memory_bytes=1)
            if self._fits(lower):
                yield "Lower its `memory_bytes`."
            return
        if not self.needs.kv:
            return
        want = self.want
        if want.concurrency > 1 and self._fits(replace(want, concurrency=1)):
            best = _largest(1, want.concurrency, lambda n: self._fits(replace(want, concurrency=n)))
            yield f"Ask for {best} sequences at once instead of {want.concurrency} (`concurrency = {best}`)."
        if want.kv_dtype == "auto" and self._fits(replace(want, kv_dtype="fp8")):
            yield 'Keep the KV cache in fp8 (`kv_dtype = "fp8"`).'

    def _other_tier(self) -> Iterator[str]:
        """Staying awake, where only the host is short of memory.

        The other way round helps only together with another (``_away``): awake it takes as much.
        """
        if self.want.tier == "standby" and self._fits(replace(self.want, tier="resident")):
            yield '`tier = "resident"` would make it fit: there is room for it to stay awake.'

    def _standby(self) -> Want:
        return replace(self.want, tier="standby")

    def _shorter(self) -> Iterator[str]:
        if not self.needs.kv or self.want.memory_bytes is not None:
            return
        want = self.want
        context = context_of(self.needs, want, self.policy)
        least = replace(want, context=LEAST_CONTEXT, concurrency=1)
        if context > LEAST_CONTEXT and self._fits(least):
            best = _largest(
                LEAST_CONTEXT // 1024, context // 1024, lambda n: self._fits(replace(least, context=n * 1024))
            )
            yield f"Shorten its context from {context} to {best * 1024} tokens (`context_length`)."

    def _others(self) -> Iterator[str]:
        """Which standing replicas would have to go, when an empty fleet would do."""
        if not self._fits(self.want, self._without(list(self.placed))):
            return
        names = sorted(self.placed, key=lambda name: (self._priority(name), self._size(name)))
        for name in names[:_MOST_TRIED]:
            if self._fits(self.want, self._without([name])):
                yield self._away([name])
                return
        # Several: those of the node that is cheapest to clear, and of them only who is in the way.
        for gone in sorted(self._neighbours(names), key=lambda gone: sum(map(self._size, gone))):
            if self._fits(self.want, self._without(gone)):
                yield self._away(self._needed(gone))
                return

    def _neighbours(self, names: Sequence[str]) -> list[list[str]]:
        """The replicas of each node, the smallest first, for a few nodes; then all."""
        by_node: dict[int, list[str]] = {}
        for name in names:
            for node, _ in self.placed[name].places:
                by_node.setdefault(node, []).append(name)
        return [*list(by_node.values())[:_MOST_TRIED], list(names)[:_MOST_TRIED]]

    def _needed(self, gone: Sequence[str]) -> list[str]:
        """Those of ``gone`` without whose going it would not fit."""
        kept = list(gone)
        for name in sorted(gone, key=self._size, reverse=True):
            fewer = [other for other in kept if other != name]
            if self._fits(self.want, self._without(fewer)):
                kept = fewer
        return kept

    def _away(self, names: Sequence[str]) -> str:
        """How these make room: asleep where that is enough, else both sides in turn, else left out."""
        models = " and ".join(dict.fromkeys(self.prepared.wants[name].model for name in names))
        them = "them" if " and " in models else "it"
        sleeping = self._with_asleep(names)
        if sleeping is not None and self._fits(self.want, sleeping):
            return f'Make {models} standby (`tier = "standby"`) or leave {them} out.'
        if sleeping is not None and self.want.tier == "resident" and self._fits(self._standby(), sleeping):
            both = f"{models} and {self.item.model}"
            return f'Make {both} standby (`tier = "standby"`): they take turns. Or leave {models} out.'
        return f"Leave {models} out."

    def _with_asleep(self, names: Sequence[str]) -> Fleet | None:
        """The fleet were these standby where they stand; None = the host has no memory for their weights."""
        fresh = self._without(names)
        by_id = {item.id: item for item in self.prepared.items}
        for name in names:
            option = self.placed[name].option
            needs = self.every[self.prepared.wants[name].model]
            option = replace(option, sleep=sleep_of(needs, option.layout, option.footprint))
            assert option.sleep is not None
            for node, gpus in self.placed[name].places:
                if fresh.host[node] < option.sleep.host * len(gpus):
                    return None
            fresh.apply(by_id[name], Move(option, self.placed[name].places))
        return fresh

    def _more_host(self) -> Iterator[str]:
        """Memory of the host that would do."""
        if not (self.item.options and _wants_host(self.item, self.room)):
            return
        missing = _weights_asleep(self.item) - max(self.room.host)
        yield (
            f"Give its node {missing / GIB:.1f} GiB more of host memory for sleeping weights "
            "(`tiers.host_memory_bytes`, or the node's form: 1x8xH200:2048), or leave a sleeping model out."
        )

    def _priority(self, name: str) -> int:
        return self.prepared.wants[name].priority

    def _size(self, name: str) -> int:
        return self.placed[name].option.total

    def _without(self, names: Sequence[str]) -> Fleet:
        kept = {name: move for name, move in self.placed.items() if name not in names}
        return _after(self.prepared, kept, self.room)

    def _more_nodes(self) -> Iterator[str]:
        for like in _distinct(self.room.nodes):
            for extra in range(1, _MOST_NODES):
                nodes = _with_nodes(self.room.nodes, extra, like)
                grown = Fleet(nodes, self.policy.utilisation, homes=self.room.homes)
                # What stands stays where it is.
                grown.free[: len(self.room.free)] = [list(free) for free in self.room.free]
                if self._fits(self.want, grown):
                    plural = "s" if extra > 1 else ""
                    yield f"{extra} more node{plural} of {like.gpus}x{like.kind.name}"
                    return

    def _other_gpus(self) -> Iterator[str]:
        """The smallest other GPU kind of which as many would do."""
        like = max(_distinct(self.room.nodes), key=lambda node: node.gpus * capacity(node.kind, 1.0))
        larger = [k for k in KINDS.values() if k.memory_bytes > like.kind.memory_bytes]
        for kind in sorted(larger, key=lambda kind: kind.memory_bytes):
            node = replace(like, kind=kind)
            if self._fits(self.want, Fleet([node], self.policy.utilisation)):
                yield f"{like.gpus}x{kind.name} instead"
                return


def _with_nodes(nodes: Sequence[Node], extra: int, like: Node) -> list[Node]:
    """The nodes and ``extra`` more like one of them."""
    return [*nodes, *(replace(like, name=f"{like.name}+{i + 1}") for i in range(extra))]


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    return list({(node.kind.name, node.gpus, node.rdma): node for node in nodes}.values())


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number of [low, high] that fits, when all below one that fits do too; low fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
