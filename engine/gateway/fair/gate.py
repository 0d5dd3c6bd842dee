"""Where the requests of one gateway worker wait for their turn at a model's replicas."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from time import monotonic

from engine.config import Config
from engine.gateway.exchange import Exchange
from engine.gateway.fair.costs import Ask, Cost, Costs
from engine.gateway.fair.flows import Entry, Someone
from engine.gateway.fair.line import Line, Rules
from engine.gateway.fair.refusals import full, too_long
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.routing import SHARED, Directory, Served
from engine.routes import ModelRoute

#: Bodies of all requests of one worker that wait for their turn together, bytes.
_MOST_BYTES = 1 << 30
#: Requests without a key are one flow.
_ANYONE = Someone("-")
_NOTHING = Ask()
#: The header with which a client says that a request can wait: "batch".
_PRIORITY = b"x-hearth-priority"


class _Queue:
    """The line of one pool of a model's replicas."""

    __slots__ = ("costs", "line", "model", "pool", "replicas", "served", "wait_s")

    def __init__(self, model: str, pool: str, line: Line, costs: Costs, wait_s: float) -> None:
        self.model = model
        self.pool = pool
        self.line = line
        self.costs = costs
        #: Longest an interactive request waits in all, seconds.
        self.wait_s = wait_s
        #: The row by which the window was last set.
        self.served: Served | None = None
        #: This worker's part of the replicas, but no less than one worker's part of one.
        self.replicas = 1.0


class Place(Entry):
    """One request's place before the replicas of its model; `leave` gives it up, wherever it is."""

    __slots__ = ("_exchange", "_gate", "estimate", "future", "pool", "queue", "waited_s")

    #: Both are set when it enters a line.
    queue: _Queue
    estimate: Cost
    #: Set when it has to wait.
    future: asyncio.Future[None] | None

    def __init__(self, gate: Gate, exchange: Exchange) -> None:
        self.state = "out"
        #: The pool that it was let in for: "" = the shared one.
        self.pool = SHARED
        self.waited_s = 0.0
        self._gate = gate
        self._exchange = exchange

    def enter(self, served: Served, without: AbstractSet[str], size: int) -> bool:
        """Goes into the line of its pool; False: its turn has to be waited for (`turn`).

        A place that it has already is kept, unless the failed replicas make it go to another pool.

        Args:
            served: the model, of the table in force.
            without: addresses that have just failed.
            size: bytes of the request's body.

        Raises:
            ApiError: 429 `queue_full`; 403 `model_not_allowed` when only other tenants are served.
        """
        exchange = self._exchange
        if self.state == "running":
            if not without or self._gate.pool_of(exchange, served, without) == self.pool:
                return True
            self.step_back()
        queue = self._gate.open_to_all.get(served)
        if queue is None:
            self.pool = pool = self._gate.pool_of(exchange, served, without)
            queue = self._gate.queue_of(served, pool)
            if queue is None:
                return True
        ask = exchange.ask or _NOTHING
        self.queue = queue
        self.pool = queue.pool
        self.estimate = estimate = queue.costs.estimate(size, ask)
        self.cost = estimate.total
        self.read = estimate.read
        self.batch = ask.batch or (_PRIORITY in exchange.headers and exchange.headers[_PRIORITY] == b"batch")
        self.who = exchange.caller or _ANYONE
        yielding = queue.line.enter(self, monotonic())
        if yielding is None:
            return True
        self.size = size
        self.future = None
        self._gate.waits(self, queue, yielding)
        return False

    async def turn(self) -> None:
        """Waits until the request may go on. Nothing may be awaited between `enter` and this.

        Raises:
            ApiError: 429 `queue_full` when it had to give way to others; 503 `queue_timeout`.
        """
        queue = self.queue
        self.future = asyncio.get_running_loop().create_future()
        began = monotonic()
        most_s = None if self.batch else max(0.0, queue.wait_s - self.waited_s)
        try:
            async with asyncio.timeout(most_s):
                await self.future
        except TimeoutError:
            if self.state == "waiting":
                outlook_s = queue.line.outlook_s(self.subject, self.batch, monotonic())
                raise too_long(queue.model, queue.wait_s, outlook_s) from None
        finally:
            self.future = None
            waited_s = monotonic() - began
            self.waited_s += waited_s
            self._gate.waited(self, queue, waited_s)
        if self.state == "evicted":
            outlook_s = queue.line.outlook_s(self.subject, self.batch, monotonic())
            raise full(queue.model, queue.line.waiting, outlook_s)

    def step_back(self) -> None:
        """Gives the place back unused, for now; harmless without one."""
        if self.state == "running":
            _wake(self.queue.line.end(self, None, monotonic()))

    def leave(self) -> None:
        """The request has ended, well or not; harmless without a place. The estimates learn from it."""
        if self.state != "running":
            return
        exchange = self._exchange
        queue = self.queue
        line = queue.line
        now = monotonic()
        if exchange.status >= 400:
            # Refused by the runner, which costs it nothing to speak of.
            actual = 0.0
        elif not exchange.complete:
            actual = queue.costs.by_time(self.estimate, now - self.since)
        else:
            ticket = exchange.ticket
            prompt, completion = (None, None) if ticket is None else ticket.tokens
            actual = queue.costs.learn(
                self.estimate,
                prompt_tokens=prompt,
                completion_tokens=completion,
                seconds=now - self.since,
                # At one replica, of all workers together, were they even.
                others_read=(line.read - self.mark - self.read) / queue.replicas,
            )
        begun = line.end(self, actual, now)
        if begun:
            _wake(begun)


class Gate:
    """The lines of one gateway worker."""

    def __init__(self, config: Config, directory: Directory, metrics: GatewayMetrics) -> None:
        self._config = config
        self._rules = config.fairness
        self._workers = config.gateway.workers
        self._directory = directory
        self._metrics = metrics
        self._queues: dict[tuple[str, str], _Queue] = {}
        self._costs: dict[str, Costs] = {}
        #: Those of the rows of the table in force of which nobody owns replicas; filled as they are used.
        self.open_to_all: dict[Served, _Queue] = {}
        self._bytes = 0
        directory.listeners.append(self._look_again)

    def place(self, exchange: Exchange) -> Place:
        """A place for a request, outside any line."""
        return Place(self, exchange)

    def waiting(self, model: str) -> int:
        """How many requests wait for their turn at the model's shared replicas."""
        queue = self._queues.get((model, SHARED))
        return 0 if queue is None else queue.line.waiting

    def pool_of(self, exchange: Exchange, served: Served, without: AbstractSet[str]) -> str:
        """Where a request is to wait and to be served now.

        Raises:
            ApiError: 403 `model_not_allowed`.
        """
        if not served.route.dedicated:
            return SHARED
        tenant = None if exchange.caller is None else exchange.caller.tenant
        served.check_open(tenant)
        return served.pool(tenant, without, window=self._window_of(served.route, 1))

    def waits(self, place: Place, queue: _Queue, yielding: list[Entry]) -> None:
        """A place has entered its line and was not let in; these give way to it.

        Raises:
            ApiError: 429 `queue_full` when it is one of them.
        """
        line = queue.line
        self._bytes += place.size
        self._metrics.queued(queue.model, 1)
        while self._bytes > _MOST_BYTES and line.waiting:
            yielding.append(line.evict())
            self._bytes -= yielding[-1].size
        _wake(yielding)
        if place.state == "evicted":
            self._waits_no_longer(place, queue)
            raise full(queue.model, line.waiting, line.outlook_s(place.subject, place.batch, monotonic()))

    def waited(self, place: Place, queue: _Queue, seconds: float) -> None:
        """A place has been waited for, however that ended."""
        if place.state == "waiting":
            queue.line.withdraw(place)
        self._waits_no_longer(place, queue)
        self._metrics.queue_waited(queue.model, seconds)

    def _waits_no_longer(self, place: Place, queue: _Queue) -> None:
        self._bytes -= place.size
        self._metrics.queued(queue.model, -1)

    def queue_of(self, served: Served, pool: str) -> _Queue | None:
        """The line of a pool; None where nobody waits for their turn."""
        route = served.route
        if route.max_batch is None or not self._rules.enabled:
            return None
        queue = self._queues.get((route.id, pool))
        if queue is None or queue.served is not served:
            queue = self._queue(served, pool, monotonic())
        if not route.dedicated:
            self.open_to_all[served] = queue
        return queue

    def _queue(self, served: Served, pool: str, now: float) -> _Queue:
        """The line of a pool, by the newest row."""
        route = served.route
        queue = self._queues.get((route.id, pool))
        if queue is None:
            own = self._config.models.get(route.id)
            most = (
                own.max_queue if own is not None and own.max_queue is not None else self._rules.most_waiting
            )
            wait_s = (
                own.queue_wait_s if own is not None and own.queue_wait_s is not None else self._rules.wait_s
            )
            costs = self._costs.get(route.id)
            if costs is None:
                costs = self._costs[route.id] = Costs(
                    route.category, route.context_length, route.max_batch or 1
                )
            line = Line(Rules(most, self._rules.active_s), None)
            queue = self._queues[(route.id, pool)] = _Queue(route.id, pool, line, costs, wait_s)
        queue.served = served
        capacity = len(served.replicas(pool)) / self._workers
        queue.replicas = max(capacity, 1 / self._workers)
        _wake(queue.line.resize(self._window(served, pool), now, capacity))
        return queue

    def _window(self, served: Served, pool: str) -> int | None:
        """How many requests of this worker may be at the pool's replicas; None = any number.

        Without a replica nobody needs to wait here: whoever is let in then waits for one.
        """
        replicas = len(served.replicas(pool))
        return self._window_of(served.route, replicas) if replicas else None

    def _window_of(self, route: ModelRoute, replicas: int) -> int | None:
        if route.max_batch is None or not self._rules.enabled:
            return None
        window = math.ceil(replicas * route.max_batch * self._rules.window_factor / self._workers)
        # Beyond that a replica is not chosen.
        return window if route.max_in_flight is None else min(window, replicas * route.max_in_flight)

    def _look_again(self) -> None:
        """There may be a new table: windows follow it, and what has no replica any more is let go."""
        self.open_to_all.clear()
        now = monotonic()
        serving = {served.route.id: served for served in self._directory}
        for key, queue in list(self._queues.items()):
            served = serving.get(queue.model)
            if served is None:
                queue.replicas = 1.0
                _wake(queue.line.resize(None, now))
                if queue.line.is_idle:
                    del self._queues[key]
                    self._costs.pop(queue.model, None)
            elif served is not queue.served:
                self._queue(served, queue.pool, now)


def _wake(entries: Iterable[Entry]) -> None:
    """Wakes those that run now or have to give way."""
    for entry in entries:
        assert isinstance(entry, Place)
        if entry.future is not None and not entry.future.done():
            entry.future.set_result(None)
