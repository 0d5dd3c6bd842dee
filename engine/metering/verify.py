"""Reconciliation: do the ledger, the local journals, the gateways' counters and the budgets agree?

`gather` reads, `explain` compares (pure): each difference has a cause that is named, and is either expected
(rows on their way) or wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.counters import Counters, read_counters
from engine.metering.database import Database
from engine.metering.journal import SUFFIX, read_only
from engine.metering.moments import period_span
from engine.metering.rows import LedgerRow, decode


@dataclass(frozen=True)
class Sums:
    """Rows and the sum of their charges."""

    rows: int = 0
    charge: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.rows + other.rows, self.charge + other.charge)


@dataclass(frozen=True)
class JournalSeen:
    """One journal file: its rows, split by whether the ledger has them already."""

    worker: str
    in_ledger: Sums
    only_here: Sums
    #: Bytes that are no whole record.
    damaged: int
    #: Rows that another life wrote, or that cannot be read.
    strange: int = 0


@dataclass(frozen=True)
class BudgetSeen:
    """A budget beside what its leases sum up to."""

    subject: str
    period: str
    used: int
    leased: int
    settled_used: int
    open_granted: int


@dataclass(frozen=True)
class Facts:
    """All that is compared. `ledger` is by worker."""

    ledger: Mapping[str, Sums]
    journals: Sequence[JournalSeen] = ()
    counters: Sequence[Counters] = ()
    #: The same, read once more after all else: on a serving machine they have gone on meanwhile.
    later: Sequence[Counters] = ()
    budgets: Sequence[BudgetSeen] = ()
    #: Sums in place of old rows, and when the newest month of them ends (unix milliseconds, or 0).
    rolled: Sums = Sums()
    rolled_until: int = 0


@dataclass(frozen=True)
class Finding:
    """One difference in words; `wrong` means that nothing expected explains it."""

    subject: str
    text: str
    wrong: bool = False


@dataclass(frozen=True)
class Report:
    """What was counted, and every difference."""

    ledger: Sums
    waiting: Sums
    findings: list[Finding] = field(default_factory=list)
    rolled: Sums = Sums()
    #: What gateway workers counted, and how many of them were heard.
    counted: Sums = Sums()
    workers: int = 0

    @property
    def good(self) -> bool:
        return not any(finding.wrong for finding in self.findings)

    def summary(self) -> str:
        """The outcome in a sentence or two."""
        wrong = sum(finding.wrong for finding in self.findings)
        answered = self.ledger + self.waiting + self.rolled
        requests = f"{answered.rows:,} answered request{'' if answered.rows == 1 else 's'}"
        if wrong:
            return f"{wrong} of {len(self.findings)} differences should not be: see WRONG above."
        if self.findings:
            return f"All differences are explained: {requests}, each counted once."
        return f"All agree: {requests}, each counted once."

    def document(self) -> dict[str, Any]:
        """As `hearth usage verify --json` tells it; charges are sums over all units."""

        def sums(of: Sums) -> dict[str, int]:
            return {"requests": of.rows, "charge": of.charge}

        return {
            "good": self.good,
            "ledger": sums(self.ledger),
            "rolled_up": sums(self.rolled),
            "journals": sums(self.waiting),
            "gateways": {"workers": self.workers, **sums(self.counted)},
            "findings": [asdict(finding) for finding in self.findings],
            "summary": self.summary(),
        }


def explain(facts: Facts) -> Report:
    """Compares the facts and explains each difference."""
    findings = [finding for journal in facts.journals for finding in _of_journal(journal)]
    waiting = {journal.worker: journal.only_here for journal in facts.journals}
    later = {counters.worker: counters for counters in facts.later}
    for counters in facts.counters:
        durable = facts.ledger.get(counters.worker, Sums()) + waiting.get(counters.worker, Sums())
        after = later.get(counters.worker, counters)
        findings += _of_counters(counters, after, durable, facts.rolled_until)
    findings += [finding for budget in facts.budgets for finding in _of_budget(budget)]
    return Report(
        ledger=sum(facts.ledger.values(), Sums()),
        waiting=sum(waiting.values(), Sums()),
        findings=findings,
        rolled=facts.rolled,
        counted=sum((Sums(each.recorded, each.charge) for each in facts.counters), Sums()),
        workers=len(facts.counters),
    )


def _of_journal(journal: JournalSeen) -> Iterable[Finding]:
    name = f"journal of {journal.worker}"
    if journal.only_here.rows:
        yield Finding(
            name,
            f"{journal.only_here.rows} answered requests (charge {journal.only_here.charge}) are on this "
            "disk and not in the ledger yet: they are folded in at once, or when the database is back, or "
            "when the next worker starts.",
        )
    if journal.in_ledger.rows:
        yield Finding(
            name,
            f"{journal.in_ledger.rows} rows are in the ledger as well: they are being folded in, or the "
            "worker ended between that and emptying its journal. They count once, by their request id.",
        )
    if journal.damaged:
        yield Finding(
            name,
            f"{journal.damaged} bytes are no whole record: one that is being written now, one that a crash "
            "cut short before its request was answered, or damage (then a .damaged copy lies beside it).",
        )
    if journal.strange:
        yield Finding(
            name,
            f"{journal.strange} records cannot be read as this worker's rows: another version of Hearth "
            "wrote them, or somebody else. Keep the file.",
            wrong=True,
        )


def _of_counters(before: Counters, after: Counters, durable: Sums, rolled_until: int) -> Iterable[Finding]:
    """Counters from `before` and `after` the rows were read: the rows lie between the two."""
    name = f"worker {before.worker}"
    missing = before.recorded - durable.rows
    extra = durable.rows - after.recorded
    if missing > 0 and before.since < rolled_until:
        yield Finding(
            name,
            f"counted {missing} more answered requests than have rows; old months were rolled up, and their "
            "sums no longer name the worker.",
        )
    elif missing > 0:
        yield Finding(
            name,
            f"counted {before.recorded} answered requests, of which {missing} are neither in the ledger "
            "nor in its journal: a request id was used twice, or rows or a journal file were removed.",
            wrong=True,
        )
    elif 0 < extra <= after.waiting:
        yield Finding(
            name,
            f"{extra} rows are durable beyond the {after.recorded} requests that it counted as answered: "
            "they were just being answered when it was looked at or ended (the last counts of a machine that "
            "lost its power are not kept).",
        )
    elif extra > 0:
        yield Finding(
            name,
            f"{extra} rows are in the ledger that the worker did not count, more than the {after.waiting} it "
            "had in hand: another process writes in its name, or its file of counters is an old one.",
            wrong=True,
        )
    elif before == after and before.recorded == durable.rows and before.charge != durable.charge:
        yield Finding(
            name,
            f"charged {before.charge} by its own count and {durable.charge} by its rows: a row was changed "
            "after it was written, or a request id was used twice with different charges.",
            wrong=True,
        )


def _of_budget(budget: BudgetSeen) -> Iterable[Finding]:
    owner, _, of = budget.subject.partition("#")
    kind = {"included": "included requests", "day": "requests of the day", "requests": "budget of requests"}
    name = f"{kind.get(of, 'budget')} of {owner} in {budget.period}"
    if budget.used != budget.settled_used:
        yield Finding(
            name,
            f"says {budget.used} used, but its settled leases used {budget.settled_used}: somebody changed "
            "one of the two by hand.",
            wrong=True,
        )
    if budget.leased != budget.open_granted:
        yield Finding(
            name,
            f"says {budget.leased} leased, but its open leases hold {budget.open_granted}: somebody changed "
            "one of the two by hand.",
            wrong=True,
        )
    elif budget.leased:
        yield Finding(
            name,
            f"{budget.leased} are with living workers, used or not, or with dead ones not settled yet.",
        )


async def gather(database: Database, folder: Path) -> Facts:
    """Reads what is compared, also while gateways serve.

    First the counters, then the journals, then the database, so that a row on its way is seen at least once,
    then the counters again.

    Raises:
        DatabaseError: the database failed.
        OSError: a journal cannot be read.
    """
    before = await asyncio.to_thread(read_counters, folder)
    read = await asyncio.to_thread(_read_journals, folder)
    table = schema.ledger
    async with database.reading() as connection:
        found = await connection.execute(
            select(table.c.worker, func.count(), func.sum(table.c.charge)).group_by(table.c.worker)
        )
        ledger = {worker: Sums(int(rows), int(charge)) for worker, rows, charge in found}
        journals = [
            await _journal(connection, worker, records, damaged)
            for worker, (records, damaged) in read.items()
        ]
        budgets = await _budgets(connection)
        old = schema.rollups.c
        found = await connection.execute(
            select(func.sum(old.requests), func.sum(old.charge), func.max(old.month))
        )
        requests, charge, month = found.one()
    rolled = Sums(int(requests or 0), int(charge or 0))
    until = 0 if month is None else period_span(month).until
    after = await asyncio.to_thread(read_counters, folder)
    return Facts(ledger, journals, before, after, budgets, rolled, until)


def _read_journals(folder: Path) -> dict[str, tuple[list[bytes], int]]:
    return {file.name.removesuffix(SUFFIX): read_only(file) for file in sorted(folder.glob(f"*{SUFFIX}"))}


async def _journal(
    connection: AsyncConnection, worker: str, records: Sequence[bytes], damaged: int
) -> JournalSeen:
    rows: dict[str, LedgerRow] = {}
    strange = 0
    for record in records:
        try:
            row = decode(record)
        except msgspec.DecodeError:
            strange += 1
            continue
        if row.worker == worker:
            rows[row.request_id] = row
        else:
            strange += 1
    there: set[str] = set()
    names = sorted(rows)
    for start in range(0, len(names), 500):
        some = names[start : start + 500]
        found = await connection.execute(
            select(schema.ledger.c.request_id).where(schema.ledger.c.request_id.in_(some))
        )
        there |= {request_id for (request_id,) in found}
    both = [row.charge for row in rows.values() if row.request_id in there]
    here = [row.charge for row in rows.values() if row.request_id not in there]
    return JournalSeen(worker, Sums(len(both), sum(both)), Sums(len(here), sum(here)), damaged, strange)


async def _budgets(connection: AsyncConnection) -> list[BudgetSeen]:
    budgets, leases = schema.budgets, schema.leases
    settled = leases.c.settled_at.is_not(None)
    found = await connection.execute(
        select(
            budgets.c.subject,
            budgets.c.period,
            budgets.c.used,
            budgets.c.leased,
            func.sum(case((settled, leases.c.used), else_=0)),
            func.sum(case((settled, 0), else_=leases.c.granted)),
        )
        # Without leases there is nothing to compare with: roll-up removes those of old periods.
        .join(leases, (leases.c.subject == budgets.c.subject) & (leases.c.period == budgets.c.period))
        .group_by(budgets.c.subject, budgets.c.period, budgets.c.used, budgets.c.leased)
    )
    return [
        BudgetSeen(subject, period, used, leased, int(settled_used), int(open_granted))
        for subject, period, used, leased, settled_used, open_granted in found
    ]
