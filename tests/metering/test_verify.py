"""Reconciliation: each difference gets its cause, and only true ones are called wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import delete, update

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.journal import Journal
from engine.metering.lease_store import LeaseStore, settle_worker
from engine.metering.ledger import Counters, LedgerWriter, write_rows
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
        (Facts({"w-1": Sums(4, 12)}, counters=[counted(3, 9, waiting=2)]), True, "about to be answered"),
        (Facts({"w-1": Sums(6, 12)}, counters=[counted(3, 9, waiting=2)]), False, "did not count"),
        (Facts({"w-1": Sums(3, 10)}, counters=[counted(3, 9)]), False, "changed after"),
        (Facts({}, budgets=[BudgetSeen("key-1", PERIOD, 5, 0, 4, 0)]), False, "says 5 used"),
        (Facts({}, budgets=[BudgetSeen("key-1", PERIOD, 4, 3, 4, 2)]), False, "says 3 leased"),
        (Facts({}, budgets=[BudgetSeen("key-1", PERIOD, 4, 3, 4, 3)]), True, "with living workers"),
    ],
)
def test_each_difference_is_explained(facts: Facts, good: bool, text: str) -> None:
    report = explain(facts)
    assert report.good is good
    assert text in words(report)
    assert len(report.findings) == 1


async def test_a_real_ledger_with_everything_in_it(tmp_path: Path, database: Database) -> None:
    with Journal(tmp_path / "w-1.journal", most_bytes=100_000) as journal:
        writer = LedgerWriter(database, journal, worker="w-1")
        writer.start()
        store = LeaseStore(database, "w-1")
        await store.lease("key-1", PERIOD, 10, 10)
        for number in range(2):
            await writer.record(row(number))
        await writer.close()
        report = explain(await gather(database, tmp_path, [writer.counters]))
        assert report.good
        assert report.ledger == Sums(2, 6)
        assert "10 units are with living workers" in words(report)
        # What a database that was away, and a crash before emptying the journal, leave.
        journal.append([encode(row(0)), encode(row(7))])
        report = explain(await gather(database, tmp_path))
        assert report.good
        assert report.waiting == Sums(1, 3)
        assert "1 rows are in the ledger as well" in words(report)


async def test_a_row_that_was_removed_is_found(tmp_path: Path, database: Database) -> None:
    await write_rows(database, [row(1), row(2)])
    async with database.writing() as connection:
        await connection.execute(delete(schema.ledger).where(schema.ledger.c.request_id == "req-1"))
    report = explain(await gather(database, tmp_path, [counted(2, 6)]))
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
