"""Usage: sums that stay the same when old months are rolled up."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from engine.metering.database import Database
from engine.metering.lease_store import LeaseStore, settle_worker
from engine.metering.ledger import write_rows
from engine.metering.usage import Asked, Line, Usage, read_usage, roll_up
from tests.metering.test_ledger import count, row


def at(year: int, month: int, day: int, *clock: int) -> int:
    return int(datetime(year, month, day, *clock, tzinfo=UTC).timestamp() * 1000)


ROWS = [
    row(1, at=at(2026, 9, 30, 23, 59, 59), charge=1, period="2026-09"),
    row(2, at=at(2026, 10, 1), charge=2, model="big", category="vision", period="2026-10"),
    row(3, at=at(2026, 10, 1, 12), charge=4, period="2026-10"),
    row(4, at=at(2026, 11, 2), charge=8, key_id="key-2"),
    row(5, at=at(2026, 11, 2), charge=16, key_id="key-9", tenant_id="ten-9"),
]


@pytest.fixture
async def filled(database: Database) -> Database:
    await write_rows(database, ROWS)
    return database


async def test_the_sums_by_day_model_and_category(filled: Database) -> None:
    usage = await read_usage(filled, Asked(tenant_id="ten-1"))
    assert usage == Usage(
        total=[Line("total", "credits", 4, 15)],
        by_day=[
            Line("2026-09-30", "credits", 1, 1),
            Line("2026-10-01", "credits", 2, 6),
            Line("2026-11-02", "credits", 1, 8),
        ],
        by_model=[Line("big", "credits", 1, 2), Line("tiny", "credits", 3, 13)],
        by_category=[Line("chat", "credits", 3, 13), Line("vision", "credits", 1, 2)],
    )
    document = usage.document()
    assert document["total"] == {"requests": 4, "charge": 15, "unit": "credits"}
    assert document["by_day"][0] == {"day": "2026-09-30", "requests": 1, "charge": 1, "unit": "credits"}


@pytest.mark.parametrize(
    ("asked", "requests"),
    [
        (Asked(), 5),
        (Asked(key_id="key-1"), 3),
        (Asked(key_id="key-1", tenant_id="ten-9"), 0),
        (Asked(since=at(2026, 10, 1), until=at(2026, 11, 1)), 2),
        (Asked(since=at(2026, 11, 1)), 2),
    ],
)
async def test_only_what_was_asked_for(filled: Database, asked: Asked, requests: int) -> None:
    before = await read_usage(filled, asked)
    assert sum(line.requests for line in before.total) == requests
    assert await roll_up(filled, "2026-11") == 3
    after = await read_usage(filled, asked)
    assert (after.total, after.by_model, after.by_category) == (
        before.total,
        before.by_model,
        before.by_category,
    )


async def test_nothing_was_used(database: Database) -> None:
    usage = await read_usage(database, Asked())
    assert usage.document()["total"] == {"requests": 0, "charge": 0, "unit": None}


async def test_two_units_are_not_added(database: Database) -> None:
    await write_rows(database, [row(1, unit="EUR", charge=5), row(2, charge=7)])
    document = (await read_usage(database, Asked())).document()
    assert document["total"] == {"requests": 2, "charge": {"EUR": 5, "credits": 7}, "unit": None}


async def test_rolling_up_again_adds_late_rows_and_days_become_months(filled: Database) -> None:
    assert await roll_up(filled, "2026-11") == 3
    assert await count(filled) == (2, 24)
    await write_rows(filled, [row(6, at=at(2026, 10, 5), charge=32, period="2026-10")])
    assert await roll_up(filled, "2026-11") == 1
    assert await roll_up(filled, "2026-11") == 0
    usage = await read_usage(filled, Asked(tenant_id="ten-1"))
    assert usage.total == [Line("total", "credits", 5, 47)]
    assert [line.name for line in usage.by_day] == ["2026-09", "2026-10", "2026-11-02"]


async def test_a_month_with_an_open_lease_stays(filled: Database) -> None:
    await LeaseStore(filled, "w-1").lease("key-1", "2026-10", 10, 10)
    assert await roll_up(filled, "2026-11") == 1
    await settle_worker(filled, "w-1")
    assert await roll_up(filled, "2026-11") == 2


async def test_rows_that_are_written_meanwhile_are_not_lost(url: str, filled: Database) -> None:
    other = Database(url)
    late = [[row(n, at=at(2026, 10, 2), charge=1, period="2026-10")] for n in range(100, 140)]
    await asyncio.gather(roll_up(filled, "2026-11"), *(write_rows(other, rows) for rows in late))
    await other.close()
    total = (await read_usage(filled, Asked())).total
    assert total == [Line("total", "credits", 45, 71)]


@pytest.mark.parametrize(("month", "reason"), [("2999-01", "not begun"), ("November", "is no month")])
async def test_a_month_that_cannot_be_rolled_up(database: Database, month: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        await roll_up(database, month)
