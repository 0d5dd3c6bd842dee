"""Requests that wait for a sleeping model, and the calls that have it woken."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterator

from engine.errors import ApiError
from engine.gateway.control import AWAY, ControlClient
from engine.gateway.exchange import Exchange
from engine.gateway.loading import not_ready
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.routing import SHARED, Directory, Served
from engine.routes import ModelRoute

log = logging.getLogger("hearth.gateway")

#: States out of which a model that may be waited for becomes ready by itself or by being asked for.
_COMES_BACK = frozenset({"planned", "starting", "warming", "ready", "asleep", "waking", "draining"})
#: Answers to a call that another call would not change: unknown, never asleep, the server is stopping.
_REFUSALS = frozenset({404, 409, 503})
#: The longest wait between two calls for one model while the scheduler is away, seconds.
_MOST_BACKOFF_S = 1.0
#: Bodies of all waiting requests of one worker together, bytes.
_MOST_BYTES = 1 << 30


class _Wake:
    """One model that this worker asks for, and how many wait for it."""

    __slots__ = ("answered", "model", "news", "refusal", "since", "task", "waiting")

    def __init__(self, model: str) -> None:
        self.model = model
        self.since = time.monotonic()
        self.waiting = 0
        #: Whether the scheduler has said that the model is ready.
        self.answered = False
        #: Why it cannot be woken, once the scheduler has said so.
        self.refusal: str | None = None
        self.news = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        """Has every waiter look again."""
        self.news.set()
        self.news = asyncio.Event()


class Waking:
    """Lets requests wait until their model has a ready replica.

    While anyone waits for a model, one `POST /wake` is held at the scheduler: the demand lives as long as
    that connection does. The last waiter to leave, for whatever reason, closes it.
    """

    def __init__(
        self,
        directory: Directory,
        metrics: GatewayMetrics,
        control: ControlClient,
        *,
        worker: int,
        first_backoff_s: float = 0.1,
    ) -> None:
        self._directory = directory
        self._metrics = metrics
        self._control = control
        self._worker = worker
        self._first_backoff_s = first_backoff_s
        self._wakes: dict[str, _Wake] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0
        directory.listeners.append(self._look_again)

    def waiting(self, model: str) -> int:
        """How many requests wait for the model."""
        wake = self._wakes.get(model)
        return wake.waiting if wake is not None else 0

    async def close(self) -> None:
        """Ends the calls."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until_ready(
        self, exchange: Exchange, model: str, *, asleep_at: int | None = None, pause_s: float = 0.0
    ) -> Served:
        """The model's row of the table once it has a ready replica.

        All waits of one request together are bounded by the route's `wake_wait_s`.

        Args:
            model: its id.
            asleep_at: the table's version under which its replicas said that they sleep: what that table
                says of them is not believed.
            pause_s: the least time to wait; for a request that was sent back before.

        Raises:
            ApiError: 503 `model_not_ready` when the model may not be waited for, its row says that it does
                not come back by itself, the scheduler cannot wake it, too many wait already, or the time is
                over; 404 when it is served no longer.
        """
        tenant = exchange.caller.tenant if exchange.caller is not None else None
        served = self._directory.find(model)
        pool = served.pool(tenant)
        if served.replicas(pool) and asleep_at is None:
            return served
        left_s = self._time_left(served.route_of(pool), exchange)
        with self._joined(served.route, exchange) as wake:
            try:
                async with asyncio.timeout(left_s):
                    if pause_s:
                        await asyncio.sleep(pause_s)
                    while True:
                        # From this look to the wait for news nothing is awaited, so no news is missed.
                        served = self._directory.find(model)
                        pool = served.pool(tenant)
                        ready = bool(served.replicas(pool))
                        if ready and (wake.answered or self._directory.version != asleep_at):
                            return served
                        self._check(served.route_of(pool), wake)
                        await wake.news.wait()
            except TimeoutError:
                served = self._directory.find(model)
                route = served.route_of(served.pool(tenant))
                note = f"This request has waited for it as long as it may, {route.wake_wait_s or left_s:g} s."
                raise self._not_ready(route, note) from None

    def _time_left(self, route: ModelRoute, exchange: Exchange) -> float:
        """How long the request may still wait, seconds."""
        if route.wake_wait_s is None or route.state not in _COMES_BACK:
            raise self._not_ready(route)
        if self.waiting(route.id) >= route.most_waiting:
            note = f"{route.most_waiting} requests wait for it already, the most that may."
            raise self._not_ready(route, note)
        if self._bytes and self._bytes + exchange.bytes_in > _MOST_BYTES:
            raise self._not_ready(route, f"The bodies of waiting requests take {self._bytes} bytes already.")
        return route.wake_wait_s - exchange.waited_s

    def _check(self, route: ModelRoute, wake: _Wake) -> None:
        """Raises the answer of a request that waits in vain."""
        if wake.refusal is not None:
            raise not_ready(route, reason=wake.refusal, elapsed_s=self._elapsed_s(route))
        if route.wake_wait_s is None or route.state not in _COMES_BACK:
            raise self._not_ready(route)

    def _not_ready(self, route: ModelRoute, note: str = "") -> ApiError:
        return not_ready(route, elapsed_s=self._elapsed_s(route), note=note)

    def _elapsed_s(self, route: ModelRoute) -> float | None:
        """How long the model has been on its way, seconds.

        Since its row left "ready" or "asleep", or since this worker first asked for it and still does,
        whichever is longer ago; None when neither is the case.
        """
        seen_s = self._directory.elapsed_s(route.id, route.owner or SHARED)
        wake = self._wakes.get(route.id)
        if wake is None:
            return seen_s
        return max(seen_s or 0.0, time.monotonic() - wake.since)

    @contextlib.contextmanager
    def _joined(self, route: ModelRoute, exchange: Exchange) -> Iterator[_Wake]:
        """A place among those who wait; given up at once when the block ends."""
        model = route.id
        wake = self._wakes.get(model)
        if wake is None:
            wake = self._wakes[model] = _Wake(model)
            wake.task = asyncio.create_task(self._ask(wake))
            self._tasks.add(wake.task)
            wake.task.add_done_callback(self._tasks.discard)
        wake.waiting += 1
        self._bytes += exchange.bytes_in
        began = time.monotonic()
        try:
            with self._metrics.waiting(model).track_inprogress():
                yield wake
        finally:
            waited_s = time.monotonic() - began
            exchange.waited_s += waited_s
            self._metrics.waited(model, waited_s)
            self._bytes -= exchange.bytes_in
            wake.waiting -= 1
            if not wake.waiting:
                del self._wakes[model]
                if wake.task is not None:
                    wake.task.cancel()

    async def _ask(self, wake: _Wake) -> None:
        """Keeps one call for the model at the scheduler, until cancelled or refused."""
        message = {"model": wake.model, "worker": self._worker}
        backoff_s = self._first_backoff_s
        while True:
            called = time.monotonic()
            try:
                status, body = await self._control.post("/wake", message, within_s=None)
            except AWAY as error:
                log.info("%s cannot be woken, the scheduler is away: %s", wake.model, error)
            else:
                if status in _REFUSALS:
                    wake.refusal = refusal(body)
                    log.warning("%s cannot be woken: %s", wake.model, wake.refusal)
                    wake.tell()
                    return
                if status == 200:
                    # The table that names its replica comes by itself; were it lost, this asks again.
                    wake.answered = True
                    wake.tell()
                else:
                    log.warning("the scheduler answered %d to a call for %s", status, wake.model)
            if time.monotonic() - called > _MOST_BACKOFF_S:
                backoff_s = self._first_backoff_s
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _MOST_BACKOFF_S)

    def _look_again(self) -> None:
        for wake in self._wakes.values():
            wake.tell()


def refusal(body: bytes) -> str:
    """The reason in the scheduler's answer: `reason` or `error` of a JSON object, else the text itself."""
    text = body.decode("utf-8", "replace").strip()
    try:
        said = json.loads(text)
    except ValueError:
        said = text
    if isinstance(said, dict):
        said = said.get("reason") or said.get("error")
    if isinstance(said, dict):
        said = said.get("message")
    return said if isinstance(said, str) and said else "the scheduler does not say why"
