"""The journal's writer: one write for rows that come together, and a slow disk keeps nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.metering import scribe as module
from engine.metering.journal import Journal
from engine.metering.scribe import Entry, Scribe


class Watched(Journal):
    """A journal that notes who wrote how many rows, and can be slow."""

    slow_s = 0.0

    def __init__(self, file: Path, *, most_bytes: int) -> None:
        super().__init__(file, most_bytes=most_bytes)
        self.writes: list[tuple[int, bool]] = []

    def append(self, records: Sequence[bytes]) -> None:
        self.writes.append((len(records), threading.current_thread() is threading.main_thread()))
        time.sleep(self.slow_s)
        super().append(records)


class Desk:
    """A scribe, and callers who wait for their rows."""

    def __init__(self, folder: Path) -> None:
        self.journal = Watched(folder / "w-1.journal", most_bytes=1 << 20)
        self.scribe = Scribe(self.journal, None, self._written)
        self.scribe.start()

    async def record(self, *, under_way: int) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.scribe.put(Entry(b"[1]", 1, done), under_way=under_way)
        await done

    def _written(self, entries: Sequence[Entry], end: int, error: Any) -> None:
        assert error is None
        for entry in entries:
            entry.done.set_result(None)

    async def close(self) -> None:
        await self.scribe.stop()
        self.journal.close()


@pytest.fixture
async def desk(tmp_path: Path) -> Any:
    made = Desk(tmp_path)
    yield made
    await made.close()


async def test_a_lone_row_is_written_at_once(desk: Desk) -> None:
    recording = asyncio.ensure_future(desk.record(under_way=1))
    await asyncio.sleep(0)
    assert recording.done()
    assert desk.journal.writes == [(1, True)]


async def test_rows_that_come_one_round_after_another_are_one_write(desk: Desk) -> None:
    async def later(rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.sleep(0)
        await desk.record(under_way=20)

    await asyncio.gather(*(later(rounds) for rounds in range(20)))
    assert desk.journal.writes == [(20, True)]
    assert len(desk.journal.records()) == 20


async def test_a_batch_does_not_wait_for_those_that_do_not_come(desk: Desk) -> None:
    began = time.monotonic()
    await asyncio.wait_for(desk.record(under_way=1000), 10)
    assert desk.journal.writes == [(1, True)]
    assert time.monotonic() - began < 5


async def test_rows_without_end_are_written_all_the_same(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_GATHER_S", 0.01)
    first = asyncio.ensure_future(desk.record(under_way=2))
    others = []
    while not first.done():
        others.append(asyncio.ensure_future(desk.record(under_way=2)))
        await asyncio.sleep(0)
        assert len(others) < 1_000_000
    await asyncio.gather(*others)
    assert sum(rows for rows, _ in desk.journal.writes) == len(others) + 1


async def test_a_slow_disk_is_a_threads_work_until_it_is_tried_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.journal.slow_s = 0.05
    await desk.record(under_way=1)
    for _ in range(3):
        recording = asyncio.ensure_future(desk.record(under_way=1))
        rounds = 0
        while not recording.done():
            rounds += 1
            await asyncio.sleep(0)
        # The event loop went on meanwhile.
        assert rounds > 10
    assert [by_loop for _, by_loop in desk.journal.writes] == [True, False, False, False]
    desk.journal.slow_s = 0.0
    monkeypatch.setattr(desk.scribe, "_apart_until", time.monotonic())
    await desk.record(under_way=1)
    await desk.record(under_way=1)
    assert [by_loop for _, by_loop in desk.journal.writes[4:]] == [True, True]


async def test_what_waits_is_written_before_the_end(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    recording = [asyncio.ensure_future(desk.record(under_way=9)) for _ in range(9)]
    await asyncio.sleep(0)
    await desk.scribe.stop()
    await asyncio.wait_for(asyncio.gather(*recording), 10)
    assert len(desk.journal.records()) == 9
    desk.journal.close()
