"""The gateways' own roll-up: by the configured number of months, and again after a failure."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.metering.database import Database, DatabaseAwayError
from engine.metering.housekeeping import Housekeeping
from engine.metering.ledger import write_rows
from engine.metering.retention import end
from tests.metering.test_ledger import count, row
from tests.metering.test_retention import NOW
from tests.metering.test_usage import ROWS


@pytest.fixture
async def filled(database: Database) -> Database:
    await write_rows(database, ROWS)
    await end(database, "w-1")
    return database


@pytest.mark.parametrize(("keep_months", "left"), [(0, 5), (2, 5), (1, 4)])
async def test_months_are_kept_as_configured(
    filled: Database, tmp_path: Path, keep_months: int, left: int
) -> None:
    keeper = Housekeeping(filled, tmp_path, keep_months=keep_months, clock=lambda: NOW / 1000)
    await keeper.tidy()
    assert (await count(filled))[0] == left


async def test_a_failure_is_tried_again_and_the_rest_is_done(
    filled: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tries, done = 0, asyncio.Event()

    async def purge() -> None:
        nonlocal tries
        tries += 1
        if tries == 3:  # the second round is complete
            done.set()
        if tries == 1:
            raise DatabaseAwayError("it is away")

    keeper = Housekeeping(filled, tmp_path, keep_months=1, every_s=0.01, first_s=0, clock=lambda: NOW / 1000)
    keeper.also(purge)
    keeper.start()
    async with asyncio.timeout(20):
        await done.wait()
    await keeper.close()
    assert (await count(filled))[0] == 4
    assert "it is away" in caplog.text


async def test_closing_before_the_first_round(database: Database, tmp_path: Path) -> None:
    keeper = Housekeeping(database, tmp_path, keep_months=1)
    await keeper.close()
    keeper.start()
    await keeper.close()
    await write_rows(database, [row(1)])
    assert (await count(database))[0] == 1
