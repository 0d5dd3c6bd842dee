"""Usage: sums that stay the same when old months are rolled up."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from engine.metering.database import Database
from engine.metering.ledger import write_rows
from engine.metering.retention import end, roll_up
from engine.metering.usage import Asked, Line, Usage, read_usage
from tests.metering.test_ledger import row


def at(year: int, month: int, day: int, *clock: int) -> int:
    return int(datetime(year, month, day, *clock).replace(tzinfo=UTC).timestamp() * 1000)


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
    await end(filled, "w-1")
    assert (await roll_up(filled, "2026-11")).rows == 3
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


async def test_by_key_and_tenant_where_asked_for(filled: Database) -> None:
    usage = await read_usage(filled, Asked(since=at(2026, 10, 1)), owners=True)
    assert usage.by_key == [
        Line("key-1", "credits", 2, 6),
        Line("key-2", "credits", 1, 8),
        Line("key-9", "credits", 1, 16),
    ]
    assert usage.by_tenant == [Line("ten-1", "credits", 3, 14), Line("ten-9", "credits", 1, 16)]
    assert usage.document()["by_tenant"][0] == {
        "tenant": "ten-1",
        "requests": 3,
        "charge": 14,
        "unit": "credits",
    }


@pytest.mark.parametrize(
    ("since", "requests"), [(0, 2), (1, 2), (at(2026, 9, 1), 2), (at(2026, 9, 1) + 1, 0)]
)
async def test_a_rolled_up_month_counts_where_it_begins(filled: Database, since: int, requests: int) -> None:
    await end(filled, "w-1")
    await write_rows(filled, [row(6, at=at(2026, 9, 2), period="2026-09")])
    await roll_up(filled, "2026-10")
    usage = await read_usage(filled, Asked(since=since, until=at(2026, 10, 1)))
    assert sum(line.requests for line in usage.total) == requests
