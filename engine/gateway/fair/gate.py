"""Where the requests of one gateway worker wait for their turn at a model's replicas."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from engine.config import Config
from engine.gateway.exchange import Exchange
from engine.gateway.fair.costs import Ask, Cost, Costs
from engine.gateway.fair.flows import Entry
from engine.gateway.fair.line import Line, Rules
from engine.gateway.fair.refusals import full, too_long
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.routing import SHARED, Directory, Served
from engine.routes import ModelRoute

#: Bodies of all requests of one worker that wait for their turn together, bytes.
_MOST_BYTES = 1 << 30
#: Requests without a key are one flow.
_ANYONE = "-"
_NOTHING = Ask()


class _Queue:
    """The line of one pool of a model's replicas."""

    __slots__ = ("costs", "line", "model", "pool", "served", "wait_s")

    def __init__(self, model: str, pool: str, line: Line, costs: Costs, wait_s: float) -> None:
        self.model = model
        self.pool = pool
        self.line = line
        self.costs = costs
        #: Longest an interactive request waits in all, seconds.
        self.wait_s = wait_s
        #: The row by which the window was last set.
        self.served: Served | None = None


class Place(Entry):
    """One request's place before the replicas of its model; `leave` gives it up, wherever it is."""

    __slots__ = ("_exchange", "_gate", "estimate", "future", "pool", "queue", "waited_s")

    def __init__(self, gate: Gate, exchange: Exchange) -> None:
        self.state = "out"
        #: The pool that it was let in for: "" = the shared one.
        self.pool = ""
        self.queue: _Queue | None = None
        self.estimate: Cost | None = None
        self.future: asyncio.Future[None] | None = None
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
        if self.state == "running":
            if not without or self._gate.pool_of(self._exchange, served, without) == self.pool:
                return True
            self.step_back()
        return self._gate.admit(self, self._exchange, served, without, size)

    async def turn(self) -> None:
        """Waits until the request may go on. Nothing may be awaited between `enter` and this.

        Raises:
            ApiError: 429 `queue_full` when it had to give way to others; 503 `queue_timeout`.
        """
        queue = self.queue
        assert queue is not None
        self.future = asyncio.get_running_loop().create_future()
        began = time.monotonic()
        most_s = None if self.batch else max(0.0, queue.wait_s - self.waited_s)
        try:
            async with asyncio.timeout(most_s):
                await self.future
        except TimeoutError:
            if self.state == "waiting":
                outlook_s = queue.line.outlook_s(self.subject, self.batch, time.monotonic())
                raise too_long(queue.model, queue.wait_s, outlook_s) from None
        finally:
            self.future = None
            waited_s = time.monotonic() - began
            self.waited_s += waited_s
            self._gate.waited(self, queue, waited_s)
        if self.state == "evicted":
            outlook_s = queue.line.outlook_s(self.subject, self.batch, time.monotonic())
            raise full(queue.model, queue.line.waiting, outlook_s)

    def step_back(self) -> None:
        """Gives the place back unused, for now; harmless without one."""
        if self.state == "running":
            self._gate.end(self, None)

    def leave(self) -> None:
        """The request has ended, well or not; harmless without a place."""
        if self.state == "running":
            self._gate.end(self, self._gate.cost_of(self, self._exchange))


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

    def admit(
        self, place: Place, exchange: Exchange, served: Served, without: AbstractSet[str], size: int
    ) -> bool:
        """Puts a place into its line; whether it may go on at once."""
        route = served.route
        caller = exchange.caller
        place.pool = pool = self.pool_of(exchange, served, without)
        if route.max_batch is None or not self._rules.enabled:
            return True
        queue = self._queues.get((route.id, pool))
        now = time.monotonic()
        if queue is None or queue.served is not served:
            queue = self._queue(served, pool, now)
        ask = exchange.ask or _NOTHING
        place.queue = queue
        place.size = size
        place.estimate = estimate = queue.costs.estimate(size, ask)
        place.cost, place.read = estimate.total, estimate.read
        place.batch = ask.batch or exchange.headers.get(b"x-hearth-priority") == b"batch"
        place.subject, place.weight = (_ANYONE, 1.0) if caller is None else (caller.subject, caller.weight)
        line = queue.line
        yielding = line.enter(place, now)
        if yielding is None:
            return True
        self._bytes += size
        self._metrics.queued(route.id, 1)
        while self._bytes > _MOST_BYTES and line.waiting:
            yielding.append(line.evict())
            self._bytes -= yielding[-1].size
        self._tell(yielding)
        if place.state == "evicted":
            self._waits_no_longer(place, queue)
            raise full(route.id, line.waiting, line.outlook_s(place.subject, place.batch, now))
        return False

    def waited(self, place: Place, queue: _Queue, seconds: float) -> None:
        """A place has been waited for, however that ended."""
        if place.state == "waiting":
            queue.line.withdraw(place)
        self._waits_no_longer(place, queue)
        self._metrics.queue_waited(queue.model, seconds)

    def end(self, place: Place, actual: float | None) -> None:
        """A place is free, its request having cost `actual`; None = it was not used."""
        assert place.queue is not None
        line = place.queue.line
        self._tell(line.end(place, actual, time.monotonic()))

    def cost_of(self, place: Place, exchange: Exchange) -> float:
        """What the request has cost, now that it ends; the estimates learn from it."""
        assert place.queue is not None and place.estimate is not None
        if exchange.status >= 400:
            # Refused by the runner, which costs it nothing to speak of.
            return 0.0
        costs, seconds = place.queue.costs, time.monotonic() - place.since
        if not exchange.complete:
            return costs.by_time(place.estimate, seconds)
        ticket = exchange.ticket
        prompt, completion = (None, None) if ticket is None else ticket.tokens
        line = place.queue.line
        return costs.learn(
            place.estimate,
            prompt_tokens=prompt,
            completion_tokens=completion,
            seconds=seconds,
            # At one replica, of all workers together, were they even.
            others_read=(line.read - place.mark - place.read) / max(line.capacity, 1 / self._workers),
        )

    def _waits_no_longer(self, place: Place, queue: _Queue) -> None:
        self._bytes -= place.size
        self._metrics.queued(queue.model, -1)

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
        self._tell(queue.line.resize(self._window(served, pool), now, capacity))
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
        now = time.monotonic()
        serving = {served.route.id: served for served in self._directory}
        for key, queue in list(self._queues.items()):
            served = serving.get(queue.model)
            if served is None:
                self._tell(queue.line.resize(None, now))
                if queue.line.is_idle:
                    del self._queues[key]
                    self._costs.pop(queue.model, None)
            elif served is not queue.served:
                self._queue(served, queue.pool, now)

    def _tell(self, entries: Iterable[Entry]) -> None:
        """Wakes those that run now or have to give way."""
        for entry in entries:
            assert isinstance(entry, Place)
            if entry.future is not None and not entry.future.done():
                entry.future.set_result(None)
