"""The auditor: compares what clients were told with the ledger, request by request."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from sqlalchemy import select

from benchmarks.crash.customers import Customer
from engine.config import ROOT, Config
from engine.metering import schema
from engine.metering.database import Database, DatabaseError
from engine.metering.journal import SUFFIX, read_only
from engine.metering.pricing import list_price
from engine.metering.rows import decode

_ROWS_AT_ONCE = 500


@dataclass
class Faults:
    """What must be 0, and examples of what was not."""

    #: Answered, and no row.
    missing: int = 0
    #: More rows than answered requests: two for one operation, or for one that nobody sent.
    twice: int = 0
    #: The row's charge is not what the answer's head said, or not the plan's price.
    wrong_charge: int = 0
    #: A row of a request that was answered with an error.
    charged_errors: int = 0
    #: Requests beyond a budget, the included ones, or those of a day.
    over: int = 0
    #: Requests that a used-up budget would still have paid for.
    unused: int = 0
    #: Answers under one Idempotency-Key that are not the same though they are kept.
    not_the_same: int = 0
    #: What `hearth usage verify` calls wrong.
    unexplained: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not any(getattr(self, each.name) for each in fields(self) if each.name != "examples")

    def add(self, what: str, found: Iterable[str] | int, where: str) -> None:
        """Counts faults of a kind; keeps some as examples."""
        named = [] if isinstance(found, int) else sorted(found)
        number = found if isinstance(found, int) else len(named)
        if not number:
            return
        setattr(self, what, getattr(self, what) + number)
        if len(self.examples) < 20:
            self.examples.append(
                f"{where}: {number} {what.replace('_', ' ')} {', '.join(named[:5])}".rstrip()
            )


@dataclass
class Counted:
    """What was found of one era's customers."""

    answered: int = 0
    rows: int = 0
    #: Rows of requests whose client was cut off after they were durable.
    unanswered: int = 0
    cut: int = 0
    tries: int = 0
    codes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Row:
    """One row of the ledger, as far as it is compared."""

    request_id: str
    charge: int
    included: bool
    period: str
    day: int


async def settled(database: Database, config: Config, *, patience_s: float = 60.0) -> float:
    """Waits until every journal is in the ledger, those of killed workers too; how long it took, seconds.

    Raises:
        TimeoutError: they are not; the message says what is left.
    """
    began = time.monotonic()
    while True:
        try:
            left, files = await _waiting(database, config.ledger_dir)
            if not left and files <= config.gateway.workers:
                return time.monotonic() - began
            told = f"{left} rows wait in {files} journals of {config.gateway.workers} workers"
        except DatabaseError as error:
            told = str(error)
        if time.monotonic() - began > patience_s:
            raise TimeoutError(f"after {patience_s:.0f} s {told}.")
        await asyncio.sleep(0.1)


async def _waiting(database: Database, folder: Path) -> tuple[int, int]:
    """Rows that are in a journal and not in the ledger; journals."""
    ids, files = await asyncio.to_thread(_journaled, folder)
    there = 0
    async with database.reading() as connection:
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            some = ids[start : start + _ROWS_AT_ONCE]
            wanted = select(schema.ledger.c.request_id).where(schema.ledger.c.request_id.in_(some))
            there += len((await connection.execute(wanted)).all())
    return len(ids) - there, files


def _journaled(folder: Path) -> tuple[list[str], int]:
    files = sorted(folder.glob(f"*{SUFFIX}"))
    ids = {decode(record).request_id for file in files for record in read_only(file)[0]}
    return sorted(ids), len(files)


async def audit(
    database: Database, customers: Sequence[Customer], faults: Faults, *, kept: bool = True
) -> Counted:
    """Holds each customer's book against its rows; nothing is in flight and all journals are folded in.

    kept: the database was there all the time, so every answer under an Idempotency-Key was kept.
    """
    counted = Counted()
    for customer in customers:
        rows = await _rows(database, customer.key_id)
        counted.answered += len(customer.operations) if customer.retries else len(customer.answered)
        counted.rows += len(rows)
        counted.cut += customer.cut
        counted.tries += customer.tries
        counted.codes += customer.codes
        if customer.retries:
            await _audit_operations(database, customer, rows, faults)
            if kept:
                _audit_kept(customer, faults)
        else:
            counted.unanswered += _audit_answers(customer, rows, faults)
        _audit_charges(customer, rows, faults)
        _audit_limits(customer, rows, faults)
    return counted


async def _rows(database: Database, key_id: str) -> dict[str, Row]:
    table = schema.ledger
    async with database.reading() as connection:
        found = await connection.execute(
            select(
                table.c.request_id, table.c.charge, table.c.included, table.c.period, table.c.at // 86_400_000
            ).where(table.c.key_id == key_id)
        )
        return {row[0]: Row(*row) for row in found}


def _audit_answers(customer: Customer, rows: dict[str, Row], faults: Faults) -> int:
    """Every answer has its row, every row its answer or a client that was cut off; how many of the latter."""
    name = customer.name
    faults.add("missing", customer.answered.keys() - rows.keys(), name)
    faults.add("twice", customer.same_id, f"{name}, one id for two answers")
    unanswered = len(rows.keys() - customer.answered.keys())
    faults.add("twice", max(0, unanswered - customer.cut), f"{name}, rows that nobody sent a request for")
    return unanswered


async def _audit_operations(
    database: Database, customer: Customer, rows: dict[str, Row], faults: Faults
) -> None:
    """Each operation, however often it was tried, has one row: the one that the database names for it."""
    name, table = customer.name, schema.idempotency
    async with database.reading() as connection:
        found = await connection.execute(
            select(table.c.idem_key, table.c.request_id).where(table.c.key_id == customer.key_id)
        )
        named: dict[str, str] = dict(found.tuples().all())
    done = {key for key, operation in customer.operations.items() if operation.answers}
    faults.add("missing", {key for key in done if named.get(key) not in rows}, f"{name}, operations")
    faults.add("twice", rows.keys() - set(named.values()), f"{name}, rows of no operation")
    faults.add("twice", max(0, len(rows) - len(customer.operations)), f"{name}, rows beyond the operations")
    shared = [id for id, times in Counter(named.values()).items() if times > 1]
    faults.add("missing", shared, f"{name}, operations that share a row")


def _audit_kept(customer: Customer, faults: Faults) -> None:
    # Of one that was cut off the answer is not known: it is answered anew, and not charged again.
    whole = {key: operation for key, operation in customer.operations.items() if not operation.cut}
    faults.add("not_the_same", {key for key, one in whole.items() if len(one.digests) > 1}, customer.name)


def _audit_charges(customer: Customer, rows: dict[str, Row], faults: Faults) -> None:
    """The charge is what was told and what the plan says; errors have no row."""
    name = customer.name
    told = {
        id: charge for book in customer.operations.values() for id, charge in book.answers if charge
    } | customer.answered
    faults.add("wrong_charge", {id for id in told.keys() & rows if told[id] != rows[id].charge}, name)
    price = list_price(customer.spec, "", "chat")
    wrong = {row.request_id for row in rows.values() if row.charge != (0 if row.included else price)}
    faults.add("wrong_charge", wrong, f"{name}, not the price")
    refused = {id for id, status in customer.refused.items() if status >= 400}
    if not customer.retries:
        faults.add("charged_errors", refused & rows.keys(), name)


def _audit_limits(customer: Customer, rows: dict[str, Row], faults: Faults) -> None:
    spec = customer.spec
    periods: dict[str, list[Row]] = defaultdict(list)
    for row in rows.values():
        periods[row.period].append(row)
    for period, found in periods.items():
        where = f"{customer.name} in {period}"
        faults.add("over", max(0, sum(row.included for row in found) - spec.included), f"{where}, included")
        if spec.budget is not None:
            used = len(found) if spec.budget.of == "requests" else sum(row.charge for row in found)
            faults.add("over", max(0, used - spec.budget.limit), f"{where}, budget")
    if spec.requests_per_day is not None:
        for day, number in Counter(row.day for row in rows.values()).items():
            faults.add("over", max(0, number - spec.requests_per_day), f"{customer.name} on day {day}")


async def audit_rest(database: Database, customer: Customer, faults: Faults) -> None:
    """After a customer was told that its limit is used up: it is, to the last request that fits."""
    if customer.most is None:
        return
    rows = len(await _rows(database, customer.key_id))
    faults.add("unused", max(0, customer.most - rows), f"{customer.name}, {rows} rows")


async def verify(config: Config, faults: Faults) -> None:
    """Runs `hearth usage verify` as a person does."""
    command = [sys.executable, "-m", "engine.cli", "usage", "verify", "--json"]
    command += ["--state-dir", str(config.state_dir)]
    own = {"PYTHONPATH": str(ROOT), "HEARTH_METERING__DATABASE_URL": config.metering.database_url}
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=config.state_dir,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 0:
        return
    try:
        found = [each for each in json.loads(done.stdout)["findings"] if each["wrong"]]
        faults.add("unexplained", [f"{each['subject']} {each['text']}" for each in found], "verify")
    except (ValueError, KeyError, TypeError):
        faults.add("unexplained", [f"{done.stdout[-500:]}{done.stderr[-500:]}"], "verify")
