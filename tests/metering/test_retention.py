"""Old rows become sums, exactly once, whoever else is at it and whatever comes back later."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.journal import Journal
from engine.metering.lease_store import LeaseStore, read_budget, settle_worker
from engine.metering.leases import Budget
from engine.metering.ledger import write_rows
from engine.metering.recovery import Recovered, begin_life, end_life, recover
from engine.metering.retention import Rolled, end, first_kept, has_ended, roll_up, settle_journals
from engine.metering.rows import LedgerRow, encode
from engine.metering.usage import Asked, Line, read_usage
from tests.metering.test_ledger import count, row
from tests.metering.test_usage import ROWS, at

NOW = at(2026, 11, 24)


async def totals(database: Database) -> list[Line]:
    return (await read_usage(database, Asked())).total


async def ids(database: Database) -> set[str]:
    async with database.reading() as connection:
        return set((await connection.execute(select(schema.ledger.c.request_id))).scalars())


@pytest.fixture
async def filled(database: Database) -> Database:
    """Five rows of a worker whose life is over, three of them before November."""
    await write_rows(database, ROWS)
    await end(database, "w-1")
    return database


async def test_rolling_up_again_adds_late_rows_and_days_become_months(filled: Database) -> None:
    assert await roll_up(filled, "2026-11") == Rolled("2026-11", {"2026-09": 1, "2026-10": 2})
    assert await count(filled) == (2, 24)
    await write_rows(filled, [row(6, at=at(2026, 10, 5), charge=32, period="2026-10")])
    assert (await roll_up(filled, "2026-11")).months == {"2026-10": 1}
    assert (await roll_up(filled, "2026-11")).rows == 0
    usage = await read_usage(filled, Asked(tenant_id="ten-1"))
    assert usage.total == [Line("total", "credits", 5, 47)]
    assert [line.name for line in usage.by_day] == ["2026-09", "2026-10", "2026-11-02"]


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
async def test_many_small_steps_give_the_same(database: Database, at_once: int) -> None:
    rows = [
        row(n, at=at(2026, 9 + n % 2, 1 + n % 3), period=f"2026-{9 + n % 2:02d}", charge=n) for n in range(12)
    ]
    await write_rows(database, rows)
    await end(database, "w-1")
    rolled = await roll_up(database, "2026-11", at_once=at_once)
    assert rolled.months == {"2026-09": 6, "2026-10": 6}
    assert await totals(database) == [Line("total", "credits", 12, 66)]
    assert await count(database) == (0, 0)


async def test_a_dry_run_says_the_same_and_changes_nothing(filled: Database) -> None:
    await write_rows(filled, [row(7, at=at(2026, 10, 2), worker="w-2")])
    would = await roll_up(filled, "2026-11", dry_run=True)
    assert would == Rolled("2026-11", {"2026-09": 1, "2026-10": 2}, kept={"w-2": 1})
    assert (await count(filled))[0] == 6
    assert await roll_up(filled, "2026-11") == would


async def test_rows_of_a_life_that_is_not_settled_stay(database: Database) -> None:
    await write_rows(database, ROWS)
    assert await roll_up(database, "2026-11") == Rolled("2026-11", {}, kept={"w-1": 3})
    assert (await count(database))[0] == 5


def journal_of(folder: Path, worker: str, rows: list[LedgerRow]) -> None:
    """What a worker leaves that was killed, or switched off, before its journal was emptied."""
    with Journal(folder / f"{worker}.journal", most_bytes=100_000) as journal:
        journal.append([encode(each) for each in rows])


async def test_a_machine_that_comes_back_after_months_is_not_counted_twice(
    tmp_path: Path, database: Database
) -> None:
    old, last, late = (row(n, at=at(2026, 10, n), period="2026-10", charge=1) for n in (1, 20, 21))
    await write_rows(database, [old, last])
    journal_of(tmp_path, "w-1", [last])
    # Looked at while it ran, before its last rows: what is older may go.
    await settle_journals(database, tmp_path, now_ms=at(2026, 10, 11))
    assert await roll_up(database, "2026-11") == Rolled("2026-11", {"2026-10": 1}, kept={"w-1": 1})
    # It is back, with one row more than the ledger has. A look at its journal keeps them, too.
    journal_of(tmp_path, "w-1", [late])
    await settle_journals(database, tmp_path, now_ms=NOW)
    assert (await roll_up(database, "2026-11")).rows == 0
    assert await recover(database, tmp_path, most_bytes=100_000) == [Recovered("w-1", 2, 0)]
    assert await totals(database) == [Line("total", "credits", 3, 3)]
    assert (await roll_up(database, "2026-11")).rows == 2
    assert await totals(database) == [Line("total", "credits", 3, 3)]


async def test_a_journal_whose_file_alone_was_left_is_not_folded_in_again(
    tmp_path: Path, database: Database
) -> None:
    """Switched off between noting its end and removing the file, and started again months later."""
    last = row(1, at=at(2026, 10, 20), period="2026-10")
    journal_of(tmp_path, "w-1", [last])
    await write_rows(database, [last])
    await end(database, "w-1")
    assert (await roll_up(database, "2026-11")).rows == 1
    assert await recover(database, tmp_path, most_bytes=100_000) == [Recovered("w-1", 0, 0)]
    # The file is gone.
    assert await recover(database, tmp_path, most_bytes=100_000) == []
    assert await totals(database) == [Line("total", "credits", 1, 3)]


async def test_a_worker_that_ends_in_order_is_settled(tmp_path: Path, database: Database) -> None:
    worker, journal = begin_life(tmp_path, most_bytes=100_000)
    await write_rows(database, [row(1, at=at(2026, 10, 20), worker=worker)])
    await end_life(database, worker, journal)
    assert (await roll_up(database, "2026-11")).rows == 1


async def test_a_living_worker_is_settled_up_to_its_oldest_row(tmp_path: Path, database: Database) -> None:
    await write_rows(database, ROWS)
    with Journal(tmp_path / "w-1.journal", most_bytes=100_000) as journal:
        await settle_journals(database, tmp_path, now_ms=NOW)
        assert (await roll_up(database, "2026-10")).rows == 1
        journal.append([encode(ROWS[2])])
        # What was said stays said; the row that was added now is older than that only if a clock went back.
        await settle_journals(database, tmp_path, now_ms=NOW)
        async with database.reading() as connection:
            until = await connection.scalar(select(schema.lives.c.settled_until))
    assert until == NOW - 86_400_000
    assert not await has_ended(database, "w-1")


async def test_a_journal_that_cannot_be_read_settles_nothing(tmp_path: Path, database: Database) -> None:
    with Journal(tmp_path / "w-1.journal", most_bytes=100_000) as journal:
        journal.append([b"of another version"])
    await settle_journals(database, tmp_path)
    await settle_journals(database, tmp_path / "missing")
    async with database.reading() as connection:
        assert await connection.scalar(select(func.count()).select_from(schema.lives)) == 0


async def test_an_end_is_for_good(tmp_path: Path, database: Database) -> None:
    journal_of(tmp_path, "w-1", ROWS[:1])
    assert not await has_ended(database, "w-1")
    await end(database, "w-1")
    await end(database, "w-1")
    await settle_journals(database, tmp_path)
    assert await has_ended(database, "w-1")


async def test_two_at_once_and_rows_that_are_written_meanwhile(url: str, filled: Database) -> None:
    other = Database(url)
    old = [row(n, at=at(2026, 10, 1 + n % 28), charge=1, period="2026-10") for n in range(1000, 1400)]
    await write_rows(filled, old)
    late = [[row(n, at=at(2026, 10, 2), charge=1, period="2026-10")] for n in range(100, 140)]
    done = await asyncio.gather(
        roll_up(filled, "2026-11", at_once=50),
        roll_up(other, "2026-11", at_once=30),
        *(write_rows(other, rows) for rows in late),
    )
    await other.close()
    rolled: list[Any] = [each for each in done if isinstance(each, Rolled)]
    assert await totals(filled) == [Line("total", "credits", 445, 471)]
    assert sum(each.rows for each in rolled) >= 400 or any(each.busy for each in rolled)
    await roll_up(filled, "2026-11")
    assert await totals(filled) == [Line("total", "credits", 445, 471)]
    assert await ids(filled) == {"req-4", "req-5"}


async def test_leases_and_budgets_go_once_all_their_lives_are_over(database: Database) -> None:
    for worker in ("w-1", "w-2"):
        await LeaseStore(database, worker).lease("key-1", "2026-10", 10, 100)
    await LeaseStore(database, "w-1").lease("key-1", "2026-11", 10, 100)
    await settle_worker(database, "w-1")
    await end(database, "w-1")

    async def leases() -> int:
        async with database.reading() as connection:
            return int(await connection.scalar(select(func.count()).select_from(schema.leases)) or 0)

    await roll_up(database, "2026-11")
    assert await leases() == 3
    # Settled since nobody heard of it, but it may come back.
    await settle_worker(database, "w-2")
    await roll_up(database, "2026-11")
    assert await leases() == 3
    await end(database, "w-2")
    await write_rows(database, [row(1)])
    await settle_worker(database, "w-1")
    await roll_up(database, "2026-11")
    assert await leases() == 1
    assert await read_budget(database, "key-1", "2026-11") == Budget(used=3, leased=0)


@pytest.mark.parametrize(
    ("months", "first"), [(0, None), (1, "2026-10"), (13, "2025-10"), (11, "2025-12"), (1200, "1970-11")]
)
def test_the_oldest_month_that_is_kept(months: int, first: str | None) -> None:
    assert first_kept(months, NOW) == first


@pytest.mark.parametrize(
    ("month", "reason"), [("2999-01", "not begun"), ("November", "no month"), ("2026-11-01", "no month")]
)
async def test_a_month_that_cannot_be_rolled_up(database: Database, month: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        await roll_up(database, month)
