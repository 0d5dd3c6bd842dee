"""The requests and keys of one line. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

#: Weight of one more observation in a mean.
NEW = 0.3


class Who(Protocol):
    """Whose a request is; never changes, so that one object means one subject with one weight."""

    @property
    def subject(self) -> str: ...

    @property
    def weight(self) -> float: ...


class Someone(NamedTuple):
    """A name and a weight, and no more."""

    subject: str
    weight: float = 1.0


class Entry:
    """One request: waiting, or at a replica, or neither."""

    __slots__ = ("batch", "cost", "flow", "mark", "read", "since", "size", "state", "who")

    #: Set when it enters its line.
    flow: Flow

    def __init__(
        self,
        subject: str,
        cost: float,
        *,
        weight: float = 1.0,
        batch: bool = False,
        size: int = 0,
        read: float = 0.0,
    ) -> None:
        self.who: Who = Someone(subject, weight)
        self.batch = batch
        self.cost = cost
        #: Prompt tokens, which hold up all others while they are read.
        self.read = read
        #: `Line.read` when it began.
        self.mark = 0.0
        #: Bytes that it keeps in memory while it waits.
        self.size = size
        #: "out" (before and after), "waiting", "running"; "evicted" = it has had to give way.
        self.state = "out"
        #: When it entered its state, on the caller's clock.
        self.since = 0.0

    @property
    def subject(self) -> str:
        return self.who.subject


class Flow:
    """What one subject has in the line, apart for interactive and batch requests."""

    __slots__ = (
        "batch",
        "debt",
        "debt_at",
        "key",
        "last",
        "let_in",
        "mean",
        "peak",
        "peak_at",
        "queued",
        "running",
        "seen",
        "tag",
        "waiting",
        "waits_since",
        "weight",
        "who",
        "work",
    )

    def __init__(self, key: tuple[str, bool], who: Who, tag: float, mean: float) -> None:
        self.key = key
        self.batch = key[1]
        #: Of its last request.
        self.who = who
        self.weight = who.weight
        self.tag = tag
        self.waiting: deque[Entry] = deque()
        #: Cost of those that wait.
        self.queued = 0.0
        #: Since when some always wait, and the cost of those that have been let in since.
        self.waits_since = 0.0
        self.let_in = 0.0
        self.running = 0
        #: Cost of those that run, as estimated.
        self.work = 0.0
        #: Mean cost of its last requests.
        self.mean = mean
        #: Whether one has ended.
        self.seen = False
        #: What it has had beyond its share of the replicas' time, as of a moment.
        self.debt = 0.0
        self.debt_at = 0.0
        #: Most requests that it has lately had at once, and since when that is so.
        self.peak = 0
        self.peak_at = 0.0
        self.last = 0.0


class Flows:
    """The active flows: those that have, or have lately had, a request; with sums over them."""

    def __init__(self, active_s: float) -> None:
        """`active_s`: a flow counts as active for this long after its last request, seconds."""
        self._active_s = active_s
        #: The one longest without a request first.
        self._flows: dict[tuple[str, bool], Flow] = {}
        #: The last of them, unless it has been forgotten.
        self._newest: Flow | None = None
        #: Weights of all, and of the interactive ones; peaks likewise; mean costs of all.
        self.weights = 0.0
        self.interactive = 0.0
        self.peaks = 0
        self.interactive_peaks = 0
        self.means = 0.0

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self._flows.values())

    def __reversed__(self) -> Iterator[Flow]:
        return reversed(self._flows.values())

    def get(self, subject: str, batch: bool) -> Flow | None:
        """The active flow of a subject."""
        return self._flows.get((subject, batch))

    def of(self, entry: Entry, now: float, tag: float) -> Flow:
        """The flow of a request that comes now; a new one begins with this tag."""
        who = entry.who
        key = (who.subject, entry.batch)
        flow = self._flows.get(key)
        if flow is None:
            self.sweep(now)
            flow = self._flows[key] = self._newest = Flow(key, who, tag, entry.cost)
            flow.last = now
            self._add(flow, flow.weight, 0)
            self.means += flow.mean
        else:
            if who is not flow.who:
                weight = who.weight
                self._add(flow, weight - flow.weight, 0)
                flow.who, flow.weight = who, weight
            self.touch(flow, now)
        has = flow.running + len(flow.waiting) + 1
        if has > flow.peak or now - flow.peak_at > self._active_s:
            self._add(flow, 0.0, has - flow.peak)
            flow.peak, flow.peak_at = has, now
        return flow

    def touch(self, flow: Flow, now: float) -> None:
        """A request of the flow has come or ended."""
        flow.last = now
        if flow is not self._newest:
            del self._flows[flow.key]
            self._flows[flow.key] = self._newest = flow

    def learn(self, flow: Flow, actual: float) -> None:
        """A request of the flow has cost so much."""
        # The first is believed: an estimate from before anything was learnt is none.
        step = (NEW if flow.seen else 1.0) * (actual - flow.mean)
        flow.seen = True
        flow.mean += step
        self.means += step

    def sweep(self, now: float) -> bool:
        """Forgets the flows that are not active any more, and their debts; whether there were any."""
        old = now - self._active_s
        gone = []
        for flow in self._flows.values():
            if flow.last > old:
                break
            if not flow.running and not flow.waiting:
                gone.append(flow)
        for flow in gone:
            del self._flows[flow.key]
            self._add(flow, -flow.weight, -flow.peak)
            self.means -= flow.mean
        if not self._flows:
            # No rounding errors are carried on for ever.
            self.weights = self.interactive = self.means = 0.0
        return bool(gone)

    def _add(self, flow: Flow, weight: float, peak: int) -> None:
        self.weights += weight
        self.peaks += peak
        if not flow.batch:
            self.interactive += weight
            self.interactive_peaks += peak
