"""Reconciliation: each difference gets its cause, and only true ones are called wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from engine.config import Config
from engine.metering import schema
from engine.metering.books import Books
from engine.metering.counters import Counters, Tally
from engine.metering.database import Database
from engine.metering.journal import Journal
from engine.metering.lease_store import LeaseStore, settle_worker
from engine.metering.ledger import LedgerWriter, write_rows
from engine.metering.rows import encode
from engine.metering.verify import BudgetSeen, Facts, JournalSeen, Report, Sums, explain, gather
from tests.metering.test_ledger import row

PERIOD = "2026-11"


def words(report: Report) -> str:
    return " | ".join(finding.text for finding in report.findings)


def counted(recorded: int, charge: int, *, waiting: int = 0) -> Counters:
    return Counters("w-1", since=0, recorded=recorded, charge=charge, waiting=waiting)


def test_all_agree() -> None:
    report = explain(Facts({"w-1": Sums(3, 9)}, counters=[counted(3, 9)]))
    assert report == Report(Sums(3, 9), Sums(), counted=Sums(3, 9), workers=1)
    assert report.good
    assert report.summary() == "All agree: 3 answered requests, each counted once."


@pytest.mark.parametrize(
    ("facts", "good", "text"),
    [
        (
            Facts({"w-1": Sums(2, 6)}, [JournalSeen("w-1", Sums(), Sums(1, 3), 0)], [counted(3, 9)]),
            True,
            "not in the ledger yet",
        ),
        (
            Facts({"w-1": Sums(3, 9)}, [JournalSeen("w-1", Sums(1, 3), Sums(), 0)], [counted(3, 9)]),
            True,
            "They count once",
        ),
        (Facts({}, [JournalSeen("w-1", Sums(), Sums(), 17)]), True, "17 bytes are no whole record"),
        (Facts({}, [JournalSeen("w-1", Sums(), Sums(), 0, strange=2)]), False, "2 records cannot be read"),
        (Facts({"w-1": Sums(2, 6)}, counters=[counted(3, 9)]), False, "1 are neither"),
        (Facts({"w-1": Sums(2, 6)}, counters=[counted(3, 9)], rolled_until=1), True, "rolled up"),
        # The worker began after the months that were rolled up.
        (Facts({"w-1": Sums(2, 6)}, counters=[counted(3, 9)], rolled_until=0), False, "1 are neither"),
        (Facts({"w-1": Sums(4, 12)}, counters=[counted(3, 9, waiting=2)]), True, "just being answered"),
        (Facts({"w-1": Sums(6, 12)}, counters=[counted(3, 9, waiting=2)]), False, "did not count"),
        (Facts({"w-1": Sums(3, 10)}, counters=[counted(3, 9)]), False, "changed after"),
        # It went on while the rows were read.
        (Facts({"w-1": Sums(6, 20)}, counters=[counted(3, 9)], later=[counted(5, 15)]), False, "1 rows"),
        (Facts({}, budgets=[BudgetSeen("key-1", PERIOD, 5, 0, 4, 0)]), False, "says 5 used"),
        (Facts({}, budgets=[BudgetSeen("key-1", PERIOD, 4, 3, 4, 2)]), False, "says 3 leased"),
        (Facts({}, budgets=[BudgetSeen("key-1", PERIOD, 4, 3, 4, 3)]), True, "3 are with living workers"),
        (Facts({}, budgets=[BudgetSeen("key-1#day", "2026-11-24", 4, 0, 3, 0)]), False, "says 4 used"),
    ],
)
def test_each_difference_is_explained(facts: Facts, good: bool, text: str) -> None:
    report = explain(facts)
    assert report.good is good
    assert text in words(report)
    assert len(report.findings) == 1


@pytest.mark.parametrize("rows", [3, 4, 6])
def test_a_worker_that_goes_on_meanwhile_agrees(rows: int) -> None:
    facts = Facts({"w-1": Sums(rows, rows * 3)}, counters=[counted(3, 9)], later=[counted(6, 18)])
    assert explain(facts).findings == []


async def test_a_real_ledger_with_everything_in_it(tmp_path: Path, database: Database) -> None:
    with Journal(tmp_path / "w-1.journal", most_bytes=100_000) as journal:
        tally = Tally(tmp_path, "w-1")
        writer = LedgerWriter(database, journal, worker="w-1", tally=tally)
        writer.start()
        store = LeaseStore(database, "w-1")
        await store.lease("key-1", PERIOD, 10, 10)
        for number in range(2):
            await writer.record(row(number))
        await writer.close()
        report = explain(await gather(database, tmp_path))
        assert report.good
        assert report.ledger == report.counted == Sums(2, 6) and report.workers == 1
        assert "10 are with living workers" in words(report)
        # What a kill leaves between folding a row in and emptying the journal, and while writing another one.
        tally.begin(1)
        journal.append([encode(row(0)), encode(row(7))])
        report = explain(await gather(database, tmp_path))
        assert report.good
        assert report.waiting == Sums(1, 3)
        assert "1 rows are in the ledger as well" in words(report)
        assert "1 rows are durable beyond the 2 requests" in words(report)


async def test_while_a_worker_serves_nothing_is_wrong(tmp_path: Path, database: Database) -> None:
    books = await Books.open(Config(state_dir=tmp_path), database)

    async def serve(caller: int) -> None:
        for number in range(60):
            books.writer.reserve()
            await books.writer.record(row(caller * 1000 + number, worker=books.worker), reserved=True)
            await asyncio.sleep(0.002)

    serving = asyncio.gather(*(serve(caller) for caller in range(4)))
    looks = 0
    while not serving.done():
        report = explain(await gather(database, tmp_path / "ledger"))
        assert report.good, words(report)
        looks += 1
    await serving
    await books.flush()
    for _ in range(200):
        # The journal is emptied a moment after its rows were folded in.
        report = explain(await gather(database, tmp_path / "ledger"))
        if not report.findings:
            break
        await asyncio.sleep(0.02)
    assert report.findings == [] and report.ledger == report.counted == Sums(240, 720)
    assert looks > 1
    await books.close()


async def test_a_row_that_was_removed_is_found(tmp_path: Path, database: Database) -> None:
    await write_rows(database, [row(1), row(2)])
    async with database.writing() as connection:
        await connection.execute(delete(schema.ledger).where(schema.ledger.c.request_id == "req-1"))
    tally = Tally(tmp_path, "w-1")
    tally.begin(2)
    tally.end(2, 6, durable=True)
    tally.close()
    report = explain(await gather(database, tmp_path))
    assert not report.good
    assert "1 are neither in the ledger nor in its journal" in words(report)


async def test_a_budget_that_was_changed_by_hand_is_found(tmp_path: Path, database: Database) -> None:
    await LeaseStore(database, "w-1").lease("key-1", PERIOD, 5, 10)
    await write_rows(database, [row(1)])
    await settle_worker(database, "w-1")
    assert explain(await gather(database, tmp_path)).findings == []
    async with database.writing() as connection:
        await connection.execute(update(schema.budgets).values(used=2))
    report = explain(await gather(database, tmp_path))
    assert not report.good
    assert "says 2 used, but its settled leases used 3" in words(report)
