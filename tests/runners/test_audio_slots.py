"""Slots: order, bounds, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from engine.errors import ApiError
from engine.runners.audio_slots import ClientGoneError, OneAtATime, Slots, current_ticket
from engine.runners.instruments import Instruments
from tests.runners.audio_files import until


def slots(most: int = 1, max_queue: int = 2) -> Slots:
    return Slots(most=most, max_queue=max_queue, name="whisper", metrics=Instruments())


async def collect(place: Slots, job: Callable[[], Iterator[object]]) -> list[object]:
    return [thing async for thing in place.stream(job)]


async def test_everything_in_order_and_an_empty_job() -> None:
    assert await collect(slots(), lambda: iter(range(500))) == list(range(500))
    assert await collect(slots(), lambda: iter(())) == []


async def test_a_failure_comes_after_what_was_yielded() -> None:
    def job() -> Iterator[int]:
        yield 1
        raise RuntimeError("cross")

    seen = []
    with pytest.raises(RuntimeError, match="cross"):
        async for thing in slots().stream(job):
            seen.append(thing)
    assert seen == [1]


async def test_never_more_than_most_at_a_time() -> None:
    running, peak, lock = 0, 0, threading.Lock()

    def job() -> Iterator[int]:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1
        yield 1

    place = slots(most=3, max_queue=20)
    await asyncio.gather(*(collect(place, job) for _ in range(12)))
    assert peak == 3


async def test_one_at_a_time() -> None:
    inside, peak = 0, 0

    class Original:
        size = 3

        def __call__(self, number: int, *, plus: int) -> int:
            nonlocal inside, peak
            inside += 1
            peak = max(peak, inside)
            threading.Event().wait(0.005)
            inside -= 1
            return number + plus

    guarded = OneAtATime(Original())
    calls = (asyncio.to_thread(guarded, number, plus=1) for number in range(6))
    assert await asyncio.gather(*calls) == [1, 2, 3, 4, 5, 6]
    assert (peak, guarded.size) == (1, 3)


async def test_one_too_many_is_told_when_to_come_back() -> None:
    gate = threading.Event()

    def job() -> Iterator[int]:
        gate.wait(5)
        yield 1

    place = slots(most=1, max_queue=2)
    tasks = [asyncio.create_task(collect(place, job)) for _ in range(3)]
    await until(lambda: place._waiting == 2)
    with pytest.raises(ApiError) as caught:
        await collect(place, job)
    assert caught.value.status == 429 and int(caught.value.headers["retry-after"]) >= 1
    gate.set()
    assert await asyncio.gather(*tasks) == [[1]] * 3
    assert place._waiting == 0


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    gate = threading.Event()

    def job() -> Iterator[int]:
        gate.wait(5)
        yield 1

    place = slots(most=1, max_queue=1)
    first = asyncio.create_task(collect(place, job))
    second = asyncio.create_task(collect(place, job))
    await until(lambda: place._waiting == 1)
    second.cancel()
    await asyncio.wait([second])
    assert place._waiting == 0
    gate.set()
    assert await first == [1]
    assert await collect(place, job) == [1]


async def test_a_client_that_goes_stops_the_job_at_its_next_call_and_frees_the_slot() -> None:
    calls, ended = [], threading.Event()
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def model() -> None:
        calls.append(1)
        await never

    def job() -> Iterator[int]:
        try:
            current_ticket().wait_for(model())
        except ClientGoneError:
            ended.set()
            raise
        yield 1

    place = slots()
    task = asyncio.create_task(collect(place, job))
    await until(lambda: bool(calls))
    task.cancel()
    await asyncio.wait([task])
    await until(ended.is_set)
    assert await collect(place, lambda: iter([7])) == [7]


async def test_a_stream_that_is_closed_stops_between_two_segments() -> None:
    given: list[int] = []
    ended = threading.Event()

    def job() -> Iterator[int]:
        try:
            for number in range(10_000):
                given.append(number)
                yield number
                threading.Event().wait(0.001)
        finally:
            ended.set()

    stream = slots().stream(job)
    async for _ in stream:
        break
    await stream.aclose()
    await until(ended.is_set)
    assert len(given) < 1000
