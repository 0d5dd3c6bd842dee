"""The writer: durable before it returns, once, with and without its database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database, DatabaseAwayError
from engine.metering.journal import Journal, JournalError, JournalFullError
from engine.metering.ledger import LedgerWriter, write_rows
from engine.metering.rows import MOST_ROW_BYTES, LedgerRow, decode, encode


def row(number: int, **changes: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "request_id": f"req-{number}",
        "key_id": "key-1",
        "tenant_id": "ten-1",
        "model": "tiny",
        "category": "chat",
        "charge": 3,
        "at": 1_790_000_000_000 + number,
        "period": "2026-11",
        "worker": "w-1",
        **changes,
    }
    return LedgerRow(**values)


async def count(database: Database) -> tuple[int, int]:
    async with database.reading() as connection:
        found = await connection.execute(
            select(func.count(), func.coalesce(func.sum(schema.ledger.c.charge), 0)).select_from(
                schema.ledger
            )
        )
        rows, charge = found.one()
    return rows, int(charge)


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 10 s")


class Away(Database):
    """A database that can be sent away, or hang."""

    away = False
    hangs = False

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        if self.away:
            raise DatabaseAwayError("The database is away.")
        if self.hangs:
            await asyncio.sleep(60)
        async with super().writing() as connection:
            yield connection


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    with Journal(tmp_path / "w-1.journal", most_bytes=9 * MOST_ROW_BYTES + 200) as made:
        yield made


@asynccontextmanager
async def writing(database: Database, journal: Journal, **settings: Any) -> AsyncIterator[LedgerWriter]:
    settings = {"retry_s": 0.01, "fold_s": 0.01, **settings}
    writer = LedgerWriter(database, journal, worker="w-1", **settings)
    writer.start()
    try:
        yield writer
    finally:
        await writer.close()


async def test_a_recorded_row_is_in_the_database(database: Database, journal: Journal) -> None:
    async with writing(database, journal) as writer:
        await writer.record(
            row(1, work={"images": 2}, prompt_tokens=7, plan_id="plan-1", unit="EUR", included=True)
        )
        assert await writer.flush()
        async with database.reading() as connection:
            found = (await connection.execute(select(schema.ledger))).mappings().one()
    assert found["charge"] == 3
    assert found["work"] == {"images": 2}
    assert (found["unit"], found["prompt_tokens"], found["completion_tokens"]) == ("EUR", 7, None)
    assert (found["included"], found["status"]) == (True, "answered")
    assert journal.size == 0


async def test_rows_that_wait_share_flushes(database: Database, journal: Journal) -> None:
    async with writing(database, journal) as writer:
        await asyncio.gather(*(writer.record(row(number)) for number in range(1200)))
        assert await writer.flush()
        assert await count(database) == (1200, 3600)
        assert writer.counters.flushes < 20
        assert (writer.counters.recorded, writer.counters.charge, writer.counters.waiting) == (1200, 3600, 0)


async def test_a_row_that_comes_twice_counts_once(database: Database, journal: Journal) -> None:
    async with writing(database, journal) as writer:
        await asyncio.gather(*(writer.record(row(number % 3)) for number in range(30)))
        await writer.record(row(1, charge=99))
    assert await count(database) == (3, 9)


async def test_what_is_recorded_while_the_database_is_away_is_folded_in_once(
    url: str, database: Database, journal: Journal
) -> None:
    away = Away(url)
    async with writing(away, journal) as writer:
        await writer.record(row(0))
        assert await writer.flush()
        away.away = True
        await asyncio.gather(*(writer.record(row(number)) for number in range(20)))
        assert not await writer.flush()
        assert (await count(database), writer.backlog) == ((1, 3), 20)
        # Whether the row that was folded before is still there depends on who was faster.
        assert {decode(record).request_id for record in journal.records()} == {f"req-{n}" for n in range(20)}
        away.away = False
        await until(lambda: writer.backlog == 0)
        assert await count(database) == (20, 60)
        await writer.record(row(20))
        assert (writer.counters.to_journal, writer.counters.to_database) == (22, 0)
    assert journal.size == 0
    assert await count(database) == (21, 63)
    await away.close()


async def test_a_hanging_database_is_replaced_too(url: str, database: Database, journal: Journal) -> None:
    away = Away(url)
    async with writing(away, journal, patience_s=0.1) as writer:
        away.hangs = True
        await writer.record(row(1))
        assert [decode(record) for record in journal.records()] == [row(1)]
        away.hangs = False
    assert await count(database) == (1, 3)
    await away.close()


async def test_without_tables_the_journal_keeps_the_rows(tmp_path: Path, url: str, journal: Journal) -> None:
    empty = Database(url)
    async with writing(empty, journal) as writer:
        await writer.record(row(1))
    assert [decode(record) for record in journal.records()] == [row(1)]
    await empty.close()


async def test_a_request_that_may_find_no_room_is_refused_before_it_is_served(
    url: str, database: Database, journal: Journal
) -> None:
    away = Away(url)
    away.away = True
    async with writing(away, journal, retry_s=60) as writer:
        admitted = 0
        with pytest.raises(JournalFullError, match="database is away"):
            for _ in range(100):
                writer.reserve()
                admitted += 1
        assert admitted == 9
        # Each that was admitted finds room, even were its row as large as can be.
        large = "x" * (MOST_ROW_BYTES - 300)
        await asyncio.gather(
            *(writer.record(row(number, work={"x": large}), reserved=True) for number in range(admitted))
        )
        with pytest.raises(JournalFullError):
            writer.reserve()
        away.away = False
        assert await writer.flush()
        await until(lambda: journal.size == 0)
        writer.reserve()
        writer.release()
    assert await count(database) == (admitted, 3 * admitted)
    await away.close()


async def test_when_nothing_takes_the_row_the_caller_hears_of_it(
    url: str, database: Database, journal: Journal
) -> None:
    away = Away(url)
    async with writing(away, journal) as writer:
        away.away = True
        journal.most_bytes = 10
        with pytest.raises(JournalError, match="full"):
            await writer.record(row(1))
        assert (writer.counters.recorded, writer.counters.charge) == (0, 0)
        away.away = False
    await away.close()


async def test_a_cancelled_caller_does_not_lose_its_row(database: Database, journal: Journal) -> None:
    async with writing(database, journal) as writer:
        caller = asyncio.create_task(writer.record(row(1)))
        await asyncio.sleep(0)
        caller.cancel()
        await writer.record(row(2))
    assert await count(database) == (2, 6)


async def test_what_a_killed_writer_journaled_is_folded_at_its_next_start(
    database: Database, journal: Journal
) -> None:
    # Row 1 was committed and then folded, but the writer was killed before it emptied its journal.
    await write_rows(database, [row(1)])
    journal.append([encode(row(1)), encode(row(2))])
    async with writing(database, journal):
        await until(lambda: journal.size == 0)
    assert await count(database) == (2, 6)


async def test_two_writers_of_one_row_at_once_write_it_once(url: str, database: Database) -> None:
    others = [Database(url) for _ in range(3)]
    await asyncio.gather(
        *(write_rows(other, [row(number) for number in range(50)]) for other in others for _ in range(3))
    )
    assert await count(database) == (50, 150)
    for other in others:
        await other.close()


async def test_a_locked_database_takes_the_journal_not_the_caller(
    url: str, database: Database, journal: Journal
) -> None:
    """Another process holds the ledger's table for longer than a flush may take."""
    async with writing(database, journal, patience_s=0.2) as writer:
        other = Database(url)
        async with other.writing() as connection:
            if not other.is_sqlite:
                await connection.execute(text("LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE"))
            await asyncio.wait_for(writer.record(row(1)), 5)
            assert len(journal.records()) == 1
        await other.close()
    assert await count(database) == (1, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"charge": -1},
        {"charge": 2**63},
        {"request_id": ""},
        {"request_id": "x" * 65},
        {"model": "a\0b"},
        {"prompt_tokens": 2**63},
        {"key_id": "k" * 65},
    ],
)
def test_a_row_that_no_database_takes_is_refused_where_it_is_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"charge|id|model|tokens"):
        row(1, **changes)


async def test_a_row_too_large_for_the_journal_is_refused(database: Database, journal: Journal) -> None:
    async with writing(database, journal) as writer:
        with pytest.raises(ValueError, match="keep `work` short"):
            await writer.record(row(1, work={"text": "x" * 10_000}))
