"""`hearth usage`: tables, CSV, JSON and bars of a ledger; whether the books agree; roll-up by hand."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from engine.config import Config
from engine.metering import schema
from engine.metering.journal import Journal
from engine.metering.ledger import write_rows
from engine.metering.opening import opened
from engine.metering.pricing import period_name
from engine.metering.retention import end
from engine.metering.rows import LedgerRow, encode
from tests.engine.test_cli_metering import Hearth

NOW = int(time.time() * 1000)
TODAY, MONTH = period_name("day", NOW), period_name("month", NOW)
OLD = int(datetime(2024, 2, 3, tzinfo=UTC).timestamp() * 1000)


def row(number: int, **changes: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "request_id": f"req-{number}",
        "key_id": "key-1",
        "tenant_id": "default",
        "model": "tiny",
        "category": "chat",
        "charge": 2,
        "unit": "EUR",
        "at": NOW,
        "period": MONTH,
        "worker": "w-1",
    }
    return LedgerRow(**(values | changes))


ROWS = [
    *(row(n) for n in range(3)),
    row(3, model="painter", category="image", charge=150),
    row(4, model="painter", category="image", charge=7, unit="credits", key_id="key-2"),
    row(5, at=OLD, period="2024-02", charge=1),
]


@pytest.fixture
def hearth(tmp_path: Path) -> Hearth:
    made = Hearth(tmp_path / "state")

    async def fill() -> None:
        async with opened(Config(state_dir=made.folder)) as database:
            await write_rows(database, ROWS)

    asyncio.run(fill())
    return made


def test_a_table_of_the_present_month(hearth: Hearth) -> None:
    code, text = hearth("usage")
    assert code == 0 and f"from {MONTH}-01 up to" in text
    lines = [line.split() for line in text.splitlines()]
    assert [TODAY, "4", "1.56", "EUR"] in lines and [TODAY, "1", "7", "credits"] in lines
    assert ["total", "5", "1.56", "EUR"] in lines
    code, text = hearth("usage", "--by", "model", "--since", "2024-01-01")
    lines = [line.split() for line in text.splitlines()]
    assert code == 0 and ["tiny", "4", "0.07", "EUR"] in lines and ["painter", "1", "1.50", "EUR"] in lines


def test_bars_are_as_long_as_there_are_requests(hearth: Hearth) -> None:
    code, text = hearth("usage", "--chart", "--by", "category")
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    assert code == 0 and bars["chat"] == 40 and 12 <= bars["image"] <= 14


def test_csv_has_the_charge_and_the_amount(hearth: Hearth) -> None:
    code, text = hearth("usage", "--csv", "--by", "key")
    assert code == 0
    read = list(csv.reader(io.StringIO(text)))
    assert read == [
        ["key", "name", "requests", "charge", "unit", "amount"],
        ["key-1", "", "4", "156", "EUR", "1.56"],
        ["key-2", "", "1", "7", "credits", "7"],
    ]


def test_json_has_all_sums_of_what_was_asked_for(hearth: Hearth) -> None:
    found = hearth.json("usage", "--key", "key-1", "--since", "2d", "--until", "2999-01-01")
    assert found["total"] == {"requests": 4, "charge": 156, "unit": "EUR"}
    assert (found["key"], found["tenant"]) == ("key-1", None)
    assert [part["tenant"] for part in found["by_tenant"]] == ["default"]
    assert found["by_day"] == [{"day": TODAY, "requests": 4, "charge": 156, "unit": "EUR"}]
    assert hearth.json("usage", "--tenant", "default")["total"]["requests"] == 5


def test_nothing_was_used(hearth: Hearth) -> None:
    code, text = hearth("usage", "--since", "2020-01-01", "--until", "2020-02-01")
    assert code == 0 and "Nothing was answered in this time." in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--since", "yesterday"], "Write 2026-11-01"),
        (["--since", "2026-11-02", "--until", "2026-11-01"], "not before until"),
        (["--tenant", "defalt"], "Did you mean 'default'?"),
        (["--key", "nobody"], "There is no key 'nobody'"),
        (["roll-up", "--before", "2999-01"], "has not begun"),
        (["roll-up", "--before", "spring"], "is no month"),
    ],
)
def test_what_cannot_be_is_told_in_words(hearth: Hearth, arguments: list[str], told: str) -> None:
    code, text = hearth("usage", *arguments)
    assert code == 1 and told in " ".join(text.split()) and "Traceback" not in text


def test_books_that_agree(hearth: Hearth) -> None:
    code, text = hearth("usage", "verify")
    assert code == 0 and "All agree: 6 answered requests, each counted once." in text
    assert hearth.json("usage", "verify")["ledger"] == {"requests": 6, "charge": 164}


def test_a_journal_is_explained(hearth: Hearth) -> None:
    ledger = hearth.folder / "ledger"
    with Journal(ledger / "w-1.journal", most_bytes=100_000) as journal:
        journal.append([encode(row(2)), encode(row(9))])
    code, text = hearth("usage", "verify")
    words = " ".join(text.split())
    assert code == 0 and "explained journal of w-1: 1 answered requests (charge 2) are on this disk" in words
    assert "All differences are explained: 7 answered requests, each counted once." in words


def test_what_is_wrong_ends_with_status_1(hearth: Hearth) -> None:
    async def change() -> None:
        async with opened(Config(state_dir=hearth.folder)) as database, database.writing() as connection:
            values = {"subject": "key-1", "period": MONTH}
            lease = {"id": "l", "worker": "w-1", "granted": 5, "used": 3, "expires_at": 0, "settled_at": 1}
            await connection.execute(schema.budgets.insert().values(**values, used=3, leased=0))
            await connection.execute(schema.leases.insert().values(**values, **lease))
            await connection.execute(update(schema.budgets).values(used=1))

    asyncio.run(change())
    code, text = hearth("usage", "verify")
    assert code == 1 and f"WRONG budget of key-1 in {MONTH}: says 1 used" in " ".join(text.split())
    code, text = hearth("usage", "verify", "--json")
    assert code == 1 and json.loads(text)["good"] is False


def test_rolling_up_by_hand(hearth: Hearth) -> None:
    code, text = hearth("usage", "roll-up")
    assert code == 0 and "1 older rows stay: their gateway workers (w-1)" in text

    async def over() -> None:
        async with opened(Config(state_dir=hearth.folder)) as database:
            await end(database, "w-1")

    asyncio.run(over())
    assert hearth.json("usage", "roll-up", "--dry-run")["months"] == {"2024-02": 1}
    code, text = hearth("usage", "roll-up")
    assert code == 0 and "2024-02: 1 rows became sums" in text
    code, text = hearth("usage", "roll-up")
    assert code == 0 and "There are no rows from before" in text
    assert hearth.json("usage", "--since", "2024-01-01")["total"]["requests"] == 6
    code, text = hearth("usage", "verify")
    assert code == 0 and "6 answered requests" in text
