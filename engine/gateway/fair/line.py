"""Who is next at a model's replicas: start-time fair queueing over keys, within a window. Pure.

Start-time fair queueing: Goyal, Vin and Cheng, "Start-time Fair Queueing: A Scheduling Algorithm for
Integrated Services Packet Switching Networks", SIGCOMM 1996; with several requests at the server at once (its
SFQ(D)): Jin, Chase and Kaur, "Interposed Proportional Sharing for a Storage Service Utility", 2004.
Each flow has a tag, the start tag of its next request; the least goes first, and its flow's tag grows by
cost / weight. A flow that was away begins at the virtual time, which is the largest start tag that has been
served. When a request has ended, its flow's tag is corrected by what the estimate was off.

That alone is not enough: engines do not interrupt what they have begun, so whoever fills the window while the
others pause makes them wait when they return. While several flows are active, each therefore has no more than
its share of the window, in requests and in work, or what the others have lately not needed of it, and always
at least one request. Where that one is much more
than what the others send, as a prompt of a hundred pages is among questions, it waits until what its flow has
had before is within the flow's share of the replicas' time, or until the replicas have nothing to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from engine.gateway.fair.flows import NEW, Entry, Flow, Flows

#: Of a flow that has waited longer, half of what it was given is forgotten again and again, seconds.
_RECENT_S = 60.0
#: A request that costs so many times what the others' do is large.
_LARGE = 2.0


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds of one line."""

    most_waiting: int = 256
    #: A flow counts as active for this long after its last request, seconds.
    active_s: float = 10.0


class Line:
    """Requests for one pool of replicas."""

    def __init__(self, rules: Rules, window: int | None, capacity: float = 1.0) -> None:
        """
        Args:
            window: most requests at the replicas at once; None = any number.
            capacity: what the replicas can do in a second, in the unit of costs.
        """
        self.rules = rules
        self.window = window
        self.capacity = capacity
        self.running = 0
        self.waiting = 0
        #: Prompt tokens of all that have run.
        self.read = 0.0
        #: Cost of all that wait.
        self.queued = 0.0
        self._batch_running = 0
        self._virtual = 0.0
        #: The largest tag that any flow has had.
        self._latest = 0.0
        self.flows = Flows(rules.active_s)
        #: Mean seconds at a replica.
        self._stay_s = 0.0
        #: The flow that has the line to itself: there is no other, it is interactive, nothing waits, and its
        #: costs and stays have means; until the next request that is not its own, or is one too many.
        self._alone: Flow | None = None
        #: As long as that many of its requests run, and until then, its next one runs at once, and its peak
        #: is what it was.
        self._alone_most = 0.0
        self._alone_until = 0.0

    def enter(self, entry: Entry, now: float) -> list[Entry] | None:
        """Lets it run or wait (see its state), or refuses it: its state is "evicted" then.

        Returns:
            Those that have to give way to it; None when it runs at once.
        """
        flow, running = self._alone, self.running
        if (
            flow is None
            or entry.who is not flow.who
            or entry.batch
            or running >= self._alone_most
            or now >= self._alone_until
        ):
            return self._enter(entry, now)
        # What `_enter` does, as far as it changes anything here.
        cost, tag, debt = entry.cost, flow.tag, flow.debt
        if tag < self._virtual:
            tag = self._virtual
        else:
            self._virtual = tag
        flow.tag = tag + cost / flow.weight
        if not debt:
            flow.debt_at = now
        flow.debt = (debt if debt < cost else cost) + cost
        flow.work += cost
        self.running = flow.running = running + 1
        entry.flow = flow
        entry.state = "running"
        entry.since = flow.last = now
        entry.mark = read = self.read
        self.read = read + entry.read
        return None

    def _enter(self, entry: Entry, now: float) -> list[Entry] | None:
        self._alone = None
        flow = self.flows.of(entry, now, self._virtual)
        entry.flow = flow
        entry.since = now
        if not flow.waiting and flow.tag < self._virtual:
            flow.tag = self._virtual
        if self._may_run(flow, entry.cost, now) or (
            self.flows.sweep(now) and self._may_run(flow, entry.cost, now)
        ):
            self._run(entry, flow, now)
            if len(self.flows) == 1 and flow.seen and self._stay_s and not flow.batch:
                window = self.window
                self._alone = flow
                self._alone_most = flow.peak if window is None else min(flow.peak, window)
                self._alone_until = flow.peak_at + self.rules.active_s
            return None
        return self._queue(entry, flow, now)

    def end(self, entry: Entry, actual: float | None, now: float) -> list[Entry]:
        """It has left its replica: those that run now instead.

        Args:
            actual: what it has cost; None = it gives its place back unused.
        """
        flow = entry.flow
        if flow is not self._alone or actual is None:
            return self._end(entry, flow, actual, now)
        # What `_end` does, as far as it changes anything here.
        entry.state = "out"
        self.running = flow.running = running = self.running - 1
        cost, tag = entry.cost, flow.tag
        flow.work = flow.work - cost if running else 0.0
        off = actual - cost
        if tag > self._latest:
            self._latest = tag
        flow.tag = tag = tag + off / flow.weight
        debt = flow.debt + off
        flow.debt = debt if debt > 0.0 else 0.0
        flow.last = now
        flow.mean = self.flows.means = flow.mean + NEW * (actual - flow.mean)
        self._stay_s += NEW * (now - entry.since - self._stay_s)
        if not running:
            self._virtual = self._latest = max(self._latest, tag)
        return []

    def _end(self, entry: Entry, flow: Flow, actual: float | None, now: float) -> list[Entry]:
        assert entry.state == "running"
        entry.state = "out"
        self.running -= 1
        flow.running -= 1
        flow.work = flow.work - entry.cost if flow.running else 0.0
        if flow.batch:
            self._batch_running -= 1
        off = (actual or 0.0) - entry.cost
        # Only here does a tag ever fall, so that its largest value is seen here.
        self._latest = max(self._latest, flow.tag)
        flow.tag += off / flow.weight
        self._latest = max(self._latest, flow.tag)
        flow.debt = max(0.0, flow.debt + off)
        self.flows.touch(flow, now)
        if actual is not None:
            self.flows.learn(flow, actual)
            stay = now - entry.since
            self._stay_s = stay if not self._stay_s else self._stay_s + NEW * (stay - self._stay_s)
        if not self.running and not self.waiting:
            # The end of a busy period: nobody keeps a debt (Goyal et al., rule 2).
            self._virtual = self._latest
            return []
        return self.advance(now) if self.waiting else []

    def withdraw(self, entry: Entry) -> None:
        """It waits no longer."""
        flow = entry.flow
        assert entry.state == "waiting"
        flow.waiting.remove(entry)
        self._forget(entry, flow)
        entry.state = "out"

    def resize(self, window: int | None, now: float, capacity: float = 1.0) -> list[Entry]:
        """Another window and capacity: those that run now."""
        self.window = window
        self.capacity = capacity
        self._alone = None
        return self.advance(now) if self.waiting else []

    def advance(self, now: float) -> list[Entry]:
        """Lets all run that may; returns them in their order."""
        self.flows.sweep(now)
        begun = []
        while self.waiting and (flow := self._next(now)) is not None:
            entry = flow.waiting.popleft()
            self._forget(entry, flow)
            flow.let_in += entry.cost
            if now - flow.waits_since > _RECENT_S:
                flow.waits_since, flow.let_in = (flow.waits_since + now) / 2, flow.let_in / 2
            self._run(entry, flow, now)
            begun.append(entry)
        return begun

    def outlook_s(self, subject: str, batch: bool, now: float) -> float:
        """How long until what waits of a flow, or ahead of its first request, has been let in, seconds.

        By the rate at which its work has been let in since it began to wait; before any has, by how long a
        request stays at a replica, and how many are there at once.
        """
        flow = self.flows.get(subject, batch)
        if flow is not None and flow.waiting and flow.let_in:
            return flow.queued * (now - flow.waits_since) / flow.let_in
        ahead = self.waiting
        if flow is not None and flow.waiting:
            rivals = sum(each.weight for each in self.flows if each.waiting and each.batch == batch)
            ahead = math.ceil(len(flow.waiting) * rivals / flow.weight)
        return self._stay_s * ahead / max(1, self.running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting and not self.running

    def _has_room(self, flow: Flow, cost: float, now: float) -> bool:
        """Whether a request of this cost may run now, as far as window and shares go."""
        window = self.window
        if window is None:
            return True
        if self.running >= window:
            return False
        if flow.batch and self.flows.interactive and self._batch_running >= max(1, window // 2):
            # Those who sit and wait must find room when they come.
            return False
        flows = self.flows
        if len(flows) == 1 or not self.running:
            return True
        rivals = flows.weights if flow.batch else flows.interactive
        if rivals <= flow.weight:
            return True
        share = flow.weight / rivals
        # Each of the others has one vote on what a request usually is, however many it sends.
        usual = (flows.means - flow.mean) / (len(flows) - 1)
        if flow.running:
            unneeded = window - (flows.peaks if flow.batch else flows.interactive_peaks) + flow.peak
            places = max(window * share, unneeded)
            if flow.running + 1 > math.ceil(places - 1e-9) or flow.work + cost > places * usual:
                return False
        if cost <= _LARGE * usual:
            return True
        return self._owed(flow, share, now) <= 0.0

    def _owed(self, flow: Flow, share: float, now: float) -> float:
        """What the flow has had beyond its share of the replicas' time, by now."""
        flow.debt = max(0.0, flow.debt - share * self.capacity * (now - flow.debt_at))
        flow.debt_at = now
        return flow.debt

    def _may_run(self, flow: Flow, cost: float, now: float) -> bool:
        """Whether a request that comes now runs at once."""
        if flow.waiting or not self._has_room(flow, cost, now):
            return False
        if not self.waiting:
            return True
        # Whoever waits beside a free place is held by its share alone, or by one that has just ended.
        other = self._next(now)
        return other is None or (flow.batch, flow.tag) < (other.batch, other.tag)

    def _next(self, now: float) -> Flow | None:
        """The flow whose first request runs next; None = nobody may. At most `most_waiting` are looked at."""
        best: Flow | None = None
        for flow in self.flows:
            if not flow.waiting:
                continue
            if best is not None and (best.batch, best.tag) <= (flow.batch, flow.tag):
                continue
            if self._has_room(flow, flow.waiting[0].cost, now):
                best = flow
        return best

    def _run(self, entry: Entry, flow: Flow, now: float) -> None:
        if flow.tag > self._virtual:
            self._virtual = flow.tag
        flow.tag += entry.cost / flow.weight
        if not flow.debt:
            flow.debt_at = now
        # What it had while nobody else wanted anything does not bar it for long.
        flow.debt = min(flow.debt, entry.cost) + entry.cost
        flow.running += 1
        flow.work += entry.cost
        self.running += 1
        if flow.batch:
            self._batch_running += 1
        entry.state = "running"
        entry.since = now
        entry.mark = self.read
        self.read += entry.read

    def _queue(self, entry: Entry, flow: Flow, now: float) -> list[Entry]:
        if not flow.waiting:
            flow.waits_since, flow.let_in = now, 0.0
        entry.state = "waiting"
        flow.waiting.append(entry)
        flow.queued += entry.cost
        self.waiting += 1
        self.queued += entry.cost
        return [self.evict()] if self.waiting > self.rules.most_waiting else []

    def evict(self) -> Entry:
        """The newest of the flow with the most work waiting for its weight gives way; batch before others.

        So that a full line refuses the one who fills it, not whoever comes next.
        """
        flow = max(
            self._waiting_flows(),
            # Of equals the one that came last.
            key=lambda each: (each.batch, each.queued / each.weight, each.waiting[-1].since),
        )
        entry = flow.waiting.pop()
        self._forget(entry, flow)
        entry.state = "evicted"
        return entry

    def _waiting_flows(self) -> Iterator[Flow]:
        """The one that had the last request first."""
        return (flow for flow in reversed(self.flows) if flow.waiting)

    def _forget(self, entry: Entry, flow: Flow) -> None:
        """Takes it, which has left its flow's queue, out of the counts."""
        self.waiting -= 1
        flow.queued = flow.queued - entry.cost if flow.waiting else 0.0
        self.queued = self.queued - entry.cost if self.waiting else 0.0
