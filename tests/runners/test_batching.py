"""What the batcher promises, whatever comes in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ApiError
from engine.runners.batching import Batcher, Work

Asked = tuple[str, int]  # key, weight


class Recorder:
    """Echoes its items and remembers the batches it ran; ``gate`` holds the first batch back."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[tuple[Hashable, list[Any]]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        if not held:
            self.gate.set()

    def __call__(self, key: Hashable, works: list[Work[Any]]) -> list[Any]:
        self.entered.set()
        assert self.gate.wait(10)
        self.batches.append((key, [work.item for work in works]))
        return [("answer", work.item) for work in works]


async def closed_after(batcher: Batcher[Any, Any], work: Awaitable[Any]) -> Any:
    try:
        return await work
    finally:
        await batcher.drain(5)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came true")


@given(
    asked=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=40),
    max_batch=st.integers(1, 6),
    max_weight=st.integers(1, 20),
    gone=st.sets(st.integers(0, 39)),
)
def test_batches_keep_their_bounds_and_every_waiter_is_answered_once(
    asked: list[Asked], max_batch: int, max_weight: int, gone: set[int]
) -> None:
    recorder = Recorder(held=True)
    items = [(number, key, weight) for number, (key, weight) in enumerate(asked)]

    async def main() -> list[Any]:
        batcher: Batcher[Any, Any] = Batcher(
            recorder,
            max_batch=max_batch,
            max_wait_s=0,
            max_queue=100,
            weigh=lambda item: int(item[2]),
            max_weight=max_weight,
        )
        blocker = asyncio.create_task(batcher.submit("blocker", (-1, "blocker", 0)))
        await until(recorder.entered.is_set)
        tasks = [asyncio.create_task(batcher.submit(item[1], item)) for item in items]
        await until(lambda: batcher.waiting == len(items))
        for number in gone:
            if number < len(tasks):
                tasks[number].cancel()
        await until(lambda: batcher.waiting == len(set(range(len(items))) - gone))
        recorder.gate.set()
        await blocker
        answers = await closed_after(batcher, asyncio.gather(*tasks, return_exceptions=True))
        assert (batcher.waiting, batcher.running) == (0, 0)
        return list(answers)

    answers = asyncio.run(main())
    for item, answer in zip(items, answers, strict=True):
        if item[0] in gone:
            assert isinstance(answer, asyncio.CancelledError)
        else:
            assert answer == ("answer", item)
    batches = recorder.batches[1:]
    ran = [item for _, batch in batches for item in batch]
    assert sorted(ran) == [item for item in items if item[0] not in gone]
    for key, batch in batches:
        assert {item[1] for item in batch} == {key}
        assert len(batch) <= max_batch
        assert len(batch) == 1 or sum(item[2] for item in batch) <= max_weight
    for key in "abc":
        numbers = [item[0] for item in ran if item[1] == key]
        assert numbers == sorted(numbers), "first come, first served"
    heads = [batch[0][0] for _, batch in batches]
    assert heads == sorted(heads), "the oldest waiting one is always in the next batch"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_an_exception_reaches_its_own_item_only(items: list[int]) -> None:
    def returned(_: Hashable, works: list[Work[int]]) -> list[int | Exception]:
        return [ValueError(work.item) if work.item % 3 == 0 else work.item for work in works]

    def raised(_: Hashable, works: list[Work[int]]) -> list[int | Exception]:
        if any(work.item % 3 == 0 for work in works):
            raise ValueError(next(work.item for work in works if work.item % 3 == 0))
        return [work.item for work in works]

    async def main(run: Callable[..., list[int | Exception]]) -> list[int | BaseException]:
        batcher = Batcher(run, max_batch=5, max_wait_s=0.001, max_queue=100)
        return list(
            await closed_after(
                batcher, asyncio.gather(*(batcher.submit("", i) for i in items), return_exceptions=True)
            )
        )

    for run in (returned, raised):
        for item, answer in zip(items, asyncio.run(main(run)), strict=True):
            if item % 3 == 0:
                assert isinstance(answer, ValueError) and answer.args == (item,)
            else:
                assert answer == item


@pytest.mark.parametrize(
    "run",
    [
        lambda _key, works: [],
        lambda _key, works: (_ for _ in ()).throw(SystemExit(3)),
    ],
    ids=["too few results", "asks the process to exit"],
)
async def test_a_faulty_run_is_an_error_and_not_a_hang(run: Callable[..., Any]) -> None:
    batcher: Batcher[int, int] = Batcher(run, max_batch=2, max_wait_s=0, max_queue=9)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(batcher.submit("", 1), 5)
    await batcher.drain(1)


async def test_a_full_batch_does_not_wait_and_a_lone_one_waits_its_time() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder, max_batch=2, max_wait_s=30, max_queue=9)
    loop = asyncio.get_running_loop()
    before = loop.time()
    await asyncio.gather(batcher.submit("", 1), batcher.submit("", 2))
    assert loop.time() - before < 5
    batcher.max_wait_s = 0.05
    before = loop.time()
    await batcher.submit("", 3)
    assert 0.045 <= loop.time() - before < 5
    await batcher.drain(1)


async def test_a_batch_is_full_when_the_next_would_be_too_heavy() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder, max_batch=9, max_wait_s=0.2, max_queue=9, weigh=lambda i: i, max_weight=10)
    await closed_after(batcher, asyncio.gather(*(batcher.submit("", weight) for weight in (6, 6, 4))))
    assert [batch for _, batch in recorder.batches] == [[6], [6, 4]]


async def test_order_sorts_inside_a_batch() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder, max_batch=3, max_wait_s=5, max_queue=9, order=lambda item: -item)
    answers = await closed_after(batcher, asyncio.gather(*(batcher.submit("", i) for i in (2, 3, 1))))
    assert recorder.batches == [("", [3, 2, 1])]
    assert answers == [("answer", 2), ("answer", 3), ("answer", 1)]


async def test_a_full_queue_refuses_with_retry_after_and_recovers() -> None:
    recorder = Recorder(held=True)
    batcher = Batcher(recorder, max_batch=1, max_wait_s=0, max_queue=2, name="tiny")
    running = asyncio.create_task(batcher.submit("", 0))
    await until(recorder.entered.is_set)
    waiting = [asyncio.create_task(batcher.submit("", i)) for i in (1, 2)]
    await until(lambda: batcher.waiting == 2)
    for refused in (lambda: batcher.submit("", 3), lambda: batcher.stream("", 3).__anext__()):
        with pytest.raises(ApiError, match="tiny has 2 requests waiting") as caught:
            await refused()
        assert caught.value.status == 429
        assert 1 <= int(caught.value.headers["retry-after"]) <= 60
    recorder.gate.set()
    await asyncio.gather(running, *waiting)
    assert await batcher.submit("", 4) == ("answer", 4)
    await batcher.drain(1)


async def test_cancelling_a_running_item_tells_the_worker_and_nobody_else() -> None:
    seen: dict[int, bool] = {}
    entered, release = threading.Event(), threading.Event()

    def run(_: Hashable, works: list[Work[int]]) -> list[int]:
        entered.set()
        assert works[0].cancelled.wait(5)
        release.wait(5)
        seen.update({work.item: work.cancelled.is_set() for work in works})
        return [work.item for work in works]

    batcher = Batcher(run, max_batch=2, max_wait_s=5, max_queue=9)
    first, second = (asyncio.create_task(batcher.submit("", i)) for i in (0, 1))
    await until(entered.is_set)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    release.set()
    assert await second == 1
    assert seen == {0: True, 1: False}
    await batcher.drain(1)


async def test_a_stream_gives_everything_in_order_then_the_error() -> None:
    def run(_: Hashable, works: list[Work[int]]) -> list[Any]:
        for step in range(100):
            for work in works:
                work.emit((work.item, step))
        return [ValueError("odd") if work.item % 2 else None for work in works]

    batcher = Batcher(run, max_batch=2, max_wait_s=5, max_queue=9)
    even, odd = batcher.stream("", 0), batcher.stream("", 1)
    assert [got async for got in even] == [(0, step) for step in range(100)]
    got = []
    with pytest.raises(ValueError, match="odd"):
        async for thing in odd:
            got.append(thing)
    assert got == [(1, step) for step in range(100)]
    await batcher.drain(1)


async def test_closing_a_stream_cancels_its_work() -> None:
    cancelled = threading.Event()

    def run(_: Hashable, works: list[Work[int]]) -> list[Any]:
        works[0].emit("first")
        if works[0].cancelled.wait(5):
            cancelled.set()
        return [None]

    batcher = Batcher(run, max_batch=1, max_wait_s=0, max_queue=9)
    stream = batcher.stream("", 0)
    assert await anext(stream) == "first"
    await stream.aclose()
    await until(cancelled.is_set)
    waiting = asyncio.create_task(anext(batcher.stream("", 1)))
    cancelled.clear()
    await until(lambda: batcher.running == 1)
    assert await waiting == "first"
    await batcher.drain(0)
    await until(cancelled.is_set)


async def test_drain_finishes_what_it_can_and_refuses_the_rest() -> None:
    recorder = Recorder(held=True)
    batcher = Batcher(recorder, max_batch=1, max_wait_s=0, max_queue=9)
    tasks = [asyncio.create_task(batcher.submit("", i)) for i in range(3)]
    await until(recorder.entered.is_set)
    await batcher.drain(0.05)
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(answer, ApiError) and answer.status == 503
    with pytest.raises(ApiError, match="is stopping"):
        await batcher.submit("", 4)
    recorder.gate.set()

    recorder = Recorder()
    batcher = Batcher(recorder, max_batch=1, max_wait_s=0, max_queue=9)
    tasks = [asyncio.create_task(batcher.submit("", i)) for i in range(3)]
    await asyncio.sleep(0)
    await batcher.drain(5)
    assert [task.result() for task in tasks] == [("answer", i) for i in range(3)]


async def test_a_closed_batcher_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    batcher = Batcher(Recorder(), max_batch=1, max_wait_s=0, max_queue=9)
    await batcher.submit("", 1)
    (worker,) = set(threading.enumerate()) - before
    await batcher.drain(1)
    await asyncio.to_thread(worker.join, 5)
    assert not worker.is_alive()


async def test_the_observer_hears_of_queue_and_batches() -> None:
    heard: list[Any] = []

    class Ears:
        def queued(self, waiting: int) -> None:
            heard.append(waiting)

        def ran(self, size: int, waits_s: Any, seconds: float) -> None:
            heard.append((size, len(waits_s), seconds >= 0))

    batcher = Batcher(Recorder(), max_batch=2, max_wait_s=5, max_queue=9, observer=Ears())
    await closed_after(batcher, asyncio.gather(batcher.submit("", 1), batcher.submit("", 2)))
    assert heard == [1, 2, 0, (2, 2, True), 0]
