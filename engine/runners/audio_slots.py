"""Places for clips under way: each has a thread of its own, so many at a time, the others wait in order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import math
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from engine.errors import ApiError
from engine.runners.instruments import Instruments

T = TypeVar("T")

_ticket: contextvars.ContextVar[Ticket] = contextvars.ContextVar("ticket")


class ClientGoneError(Exception):
    """Raised inside a job's thread once its client has gone."""


class Ticket:
    """One job's link between its thread and the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.cancelled = threading.Event()
        self._loop = loop
        self._waits: concurrent.futures.Future[Any] | None = None

    def wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Blocks the job's thread until the coroutine has run on the loop.

        Raises:
            ClientGoneError: the client has gone; the coroutine is cancelled.
        """
        if self.cancelled.is_set():
            coroutine.close()
            raise ClientGoneError
        self._waits = waits = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        if self.cancelled.is_set():  # set between the two: whoever set it may have seen no future yet
            waits.cancel()
        try:
            return waits.result()
        except concurrent.futures.CancelledError:
            raise ClientGoneError from None

    def cancel(self) -> None:
        """Called on the loop: stops the job at its next call of the model, and what it waits for at once."""
        self.cancelled.set()
        if self._waits is not None:
            self._waits.cancel()


def current_ticket() -> Ticket:
    """The ticket of the job whose thread this is."""
    return _ticket.get()


class OneAtATime:
    """A callable that threads use in turn; everything else is the original's own."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._lock:
            return self._original(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class Slots:
    """Runs jobs in threads, at most ``most`` at a time; at most ``max_queue`` more may wait.

    Args:
        most: jobs under way together.
        max_queue: jobs that may wait; one more is refused with 429.
        name: the model's, for messages.
        metrics: told how many wait and how long each waited.
    """

    def __init__(self, *, most: int, max_queue: int, name: str, metrics: Instruments) -> None:
        self._most = most
        self._max_queue = max_queue
        self._name = name
        self._metrics = metrics
        self._free = asyncio.Semaphore(most)
        self._waiting = 0
        self._running = 0
        self._seconds = 0.0  # moving average of a job, for retry-after
        self._threads = concurrent.futures.ThreadPoolExecutor(most, thread_name_prefix="clip")

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs, its client gone or not."""
        return self._waiting > 0 or self._running > 0

    async def stream(self, job: Callable[[], Iterable[T]]) -> AsyncGenerator[T, None]:
        """What the job yields, as it comes. Closing the iterator or cancelling its task stops the job.

        Raises:
            ApiError: 429 when too many wait.
            Exception: whatever the job raises.
        """
        await self._enter()
        loop = asyncio.get_running_loop()
        ticket = Ticket(loop)
        things: asyncio.Queue[T] = asyncio.Queue()

        def work() -> None:
            _ticket.set(ticket)
            for thing in job():
                if ticket.cancelled.is_set():
                    raise ClientGoneError
                with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                    loop.call_soon_threadsafe(things.put_nowait, thing)

        started = loop.time()
        self._running += 1
        running: asyncio.Future[Any] = loop.run_in_executor(
            self._threads, contextvars.copy_context().run, work
        )
        running.add_done_callback(lambda done: self._left(done, loop.time() - started))
        try:
            while not (running.done() and things.empty()):
                if things.empty():
                    getting: asyncio.Future[Any] = asyncio.ensure_future(things.get())
                    try:
                        await asyncio.wait([getting, running], return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        getting.cancel()
                    if getting.done() and not getting.cancelled():
                        yield getting.result()
                else:
                    yield things.get_nowait()
            running.result()
        finally:
            ticket.cancel()

    async def _enter(self) -> None:
        if self._free.locked() and self._waiting >= self._max_queue:
            after = min(60, max(1, math.ceil(self._waiting / self._most * self._seconds)))
            raise ApiError(
                429,
                f"{self._name} has {self._waiting} requests waiting, its limit. "
                f"Try again in about {after} s, or raise max_queue or replicas of this model.",
                code="queue_full",
                headers={"retry-after": str(after)},
            )
        since = asyncio.get_running_loop().time()
        self._wait(+1)
        try:
            await self._free.acquire()
        finally:
            self._wait(-1)
        self._metrics.queue_wait_seconds.observe(asyncio.get_running_loop().time() - since)

    def _wait(self, change: int) -> None:
        self._waiting += change
        self._metrics.queued(self._waiting)

    def _left(self, done: asyncio.Future[None], seconds: float) -> None:
        self._free.release()
        self._running -= 1
        self._seconds = seconds if not self._seconds else 0.7 * self._seconds + 0.3 * seconds
        if not done.cancelled():
            done.exception()  # marks it as seen: after a cancellation nobody reads it
