"""Dynamic batching: requests that wait together run together, in one worker thread.

The event loop owns the queue; the thread owns the model. Nothing polls: an idle batcher costs no CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from engine.errors import ApiError
from engine.runners.streams import Stream

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class Work(Generic[Item]):
    """One request as ``run`` sees it.

    ``cancelled`` is set once its client has gone: stop as soon as that is cheap, what is returned for it is
    dropped. ``emit`` may be called from the worker thread; what it is given comes out of
    :meth:`Batcher.stream`, in order.
    """

    item: Item
    cancelled: threading.Event = field(default_factory=threading.Event)
    emit: Callable[[Any], None] = lambda _: None


class Observer(Protocol):
    """Told what happens, on the event loop; for metrics."""

    def queued(self, waiting: int) -> None:
        """The queue now holds ``waiting`` requests."""

    def ran(self, size: int, waits_s: Sequence[float], seconds: float) -> None:
        """A batch of ``size`` ran for ``seconds``; ``waits_s`` are its members' times in the queue."""


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    key: Hashable
    work: Work[Item]
    weight: int
    since: float
    answer: asyncio.Future[Result]


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    key: Hashable
    works: list[Work[Item]]
    done: Callable[[list[Result | Exception]], None]


class Batcher(Generic[Item, Result]):
    """Gathers requests into batches and runs them one batch after another.

    The oldest waiting request is always in the next batch, joined by those of an equal key in the order they
    came, up to ``max_batch`` of them and ``max_weight`` in sum (a heavier one runs alone). It waits at most
    ``max_wait_s`` for company, and not at all once a batch is full; while a batch runs the next one gathers.

    Args:
        run: called in the worker thread with a key and works of that key; returns one result or exception for
            each, in order. If it raises, each work is run again alone (unless it had emitted), so that a bad
            request does not fail its neighbours.
        max_batch: most works of a batch.
        max_wait_s: longest wait for company, seconds.
        max_queue: most waiting works; one more is refused with 429.
        weigh: an item's weight, for instance its tokens.
        max_weight: largest sum of weights of a batch.
        order: sort key inside a batch, for instance its length; the order of arrival without one.
        name: for error messages.
        observer: for metrics.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Work[Item]]], list[Result | Exception]],
        *,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        weigh: Callable[[Item], int] | None = None,
        max_weight: int | None = None,
        order: Callable[[Item], Any] | None = None,
        name: str = "",
        observer: Observer | None = None,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or max_wait_s < 0:
            raise ValueError("max_batch and max_queue must be at least 1, max_wait_s at least 0")
        self._run = run
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self.max_queue = max_queue
        self._weigh = weigh
        self._max_weight = max_weight if max_weight is not None else math.inf
        self._order = order
        self.name = name or "this model"
        self._observer = observer
        self._waiting: list[_Entry[Item, Result]] = []
        self._running: list[_Entry[Item, Result]] = []
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._collector: asyncio.Task[None] | None = None
        self._jobs: queue.SimpleQueue[_Job[Item, Result] | None] = queue.SimpleQueue()
        self._seconds = 0.0  # moving average of a batch's duration, for retry-after

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    async def submit(self, key: Hashable, item: Item) -> Result:
        """Waits for the item's result.

        Cancelling the awaiting task takes a waiting item out of the queue, and sets ``cancelled`` of a
        running one.

        Raises:
            ApiError: 429 when the queue is full, 503 once closed.
            Exception: whatever ``run`` returned or raised for this item.
        """
        entry = self._enter(key, Work(item))
        try:
            return await entry.answer
        finally:
            self._leave(entry)

    def stream(self, key: Hashable, item: Item) -> Stream:
        """An async iterator over what ``run`` emits for the item; it ends when ``run`` returns.

        Refusals (429, 503) are raised by this call itself, so that they still become a status of their own.
        """
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(thing: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                loop.call_soon_threadsafe(arrived.put_nowait, thing)

        entry = self._enter(key, Work(item, emit=emit))
        return Stream(arrived, entry.answer, lambda: self._leave(entry))

    async def drain(self, deadline_s: float) -> None:
        """Lets what waits and runs finish for at most ``deadline_s`` seconds, then answers the rest 503."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        self._closed = True
        if self._collector is not None:
            self._collector.cancel()
            await asyncio.wait([self._collector])
        for entry in [*self._running, *self._waiting]:
            entry.work.cancelled.set()
            if not entry.answer.done():
                entry.answer.set_exception(self._stopping())
        self._waiting.clear()

    def _stopping(self) -> ApiError:
        return ApiError(
            503, f"{self.name} is stopping. Try again.", code="stopping", headers={"retry-after": "1"}
        )

    def _enter(self, key: Hashable, work: Work[Item]) -> _Entry[Item, Result]:
        if self._closed:
            raise self._stopping()
        if len(self._waiting) >= self.max_queue:
            batches = math.ceil(len(self._waiting) / self.max_batch)
            after = min(60, max(1, math.ceil(batches * self._seconds)))
            raise ApiError(
                429,
                f"{self.name} has {len(self._waiting)} requests waiting, its limit. "
                f"Try again in about {after} s, or raise max_queue or replicas of this model.",
                code="queue_full",
                headers={"retry-after": str(after)},
            )
        loop = asyncio.get_running_loop()
        weight = self._weigh(work.item) if self._weigh else 0
        entry: _Entry[Item, Result] = _Entry(key, work, weight, loop.time(), loop.create_future())
        if self._collector is None:
            threading.Thread(target=_work_through, args=(self._jobs, self._guarded), daemon=True).start()
            self._collector = loop.create_task(self._collect())
        self._waiting.append(entry)
        self._touch()
        return entry

    def _leave(self, entry: _Entry[Item, Result]) -> None:
        """The waiter has gone, answered or not."""
        if not entry.answer.done() or entry.answer.cancelled():
            entry.work.cancelled.set()
            entry.answer.cancel()
        else:
            entry.answer.exception()  # marks it as seen, so that asyncio does not complain of it
        if entry in self._waiting:
            self._waiting.remove(entry)
            self._touch()

    def _touch(self) -> None:
        self._changed.set()
        if self._waiting or self._running:
            self._idle.clear()
        else:
            self._idle.set()
        if self._observer:
            self._observer.queued(len(self._waiting))

    async def _collect(self) -> None:
        try:
            while True:
                await self._company()
                await self._run_batch(self._take())
        finally:
            self._jobs.put(None)

    async def _company(self) -> None:
        """Returns when the next batch is full or its oldest member has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            if not self._waiting:
                await self._changed.wait()
                continue
            _, full = self._select()
            left = self._waiting[0].since + self.max_wait_s - loop.time()
            if full or left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    def _select(self) -> tuple[list[_Entry[Item, Result]], bool]:
        """The next batch in order of arrival, and whether nothing more could join it."""
        head = self._waiting[0]
        chosen, weight = [head], head.weight
        for entry in self._waiting[1:]:
            if len(chosen) >= self.max_batch:
                break
            if entry.key != head.key:
                continue
            if weight + entry.weight > self._max_weight:
                return chosen, True
            chosen.append(entry)
            weight += entry.weight
        return chosen, len(chosen) >= self.max_batch or weight >= self._max_weight

    def _take(self) -> list[_Entry[Item, Result]]:
        chosen, _ = self._select()
        gone = set(map(id, chosen))
        self._waiting = [entry for entry in self._waiting if id(entry) not in gone]
        order = self._order
        return sorted(chosen, key=lambda entry: order(entry.work.item)) if order else chosen

    async def _run_batch(self, batch: list[_Entry[Item, Result]]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        finished: asyncio.Future[list[Result | Exception]] = loop.create_future()

        def settle(results: list[Result | Exception]) -> None:
            if not finished.done():
                finished.set_result(results)

        def done(results: list[Result | Exception]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
                loop.call_soon_threadsafe(settle, results)

        self._running = batch
        self._touch()
        self._jobs.put(_Job(batch[0].key, [entry.work for entry in batch], done))
        results = await finished
        self._running = []
        seconds = loop.time() - started
        self._seconds = seconds if not self._seconds else 0.7 * self._seconds + 0.3 * seconds
        for entry, result in zip(batch, results, strict=True):
            if entry.answer.done():
                continue
            if isinstance(result, Exception):
                entry.answer.set_exception(result)
            else:
                entry.answer.set_result(result)
        if self._observer:
            self._observer.ran(len(batch), [started - entry.since for entry in batch], seconds)
        self._touch()

    def _guarded(self, key: Hashable, works: list[Work[Item]]) -> list[Result | Exception]:
        """Runs in the worker thread; never raises, answers every work."""
        emitted = _watch_emits(works)
        try:
            results = self._run(key, works)
            if len(results) != len(works):
                raise RuntimeError(f"{self.name}: run() gave {len(results)} results for {len(works)} works")
            return results
        except Exception as error:
            if len(works) == 1 or emitted.is_set():
                return [error for _ in works]
        return [self._guarded(key, [work])[0] for work in works]


def _watch_emits(works: Iterable[Work[Any]]) -> threading.Event:
    """An event that is set once any of the works has emitted."""
    emitted = threading.Event()

    def watched(emit: Callable[[Any], None]) -> Callable[[Any], None]:
        def tell(thing: Any) -> None:
            emitted.set()
            emit(thing)

        return tell

    for work in works:
        work.emit = watched(work.emit)
    return emitted


def _work_through(
    jobs: queue.SimpleQueue[_Job[Any, Any] | None],
    guarded: Callable[[Hashable, list[Work[Any]]], list[Any]],
) -> None:
    """The worker thread: one job after another until None."""
    while (job := jobs.get()) is not None:
        try:
            results = guarded(job.key, job.works)
        except (
            BaseException
        ) as error:  # SystemExit and the like: the thread must outlive it, the waiters must hear
            results = [RuntimeError(f"the engine gave up: {error!r}") for _ in job.works]
        job.done(results)
