"""The kill test's auditor finds each kind of fault that it is there for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, update

from benchmarks.crash.audit import Faults, audit, audit_rest
from benchmarks.crash.clients import Outcome
from benchmarks.crash.customers import Customer
from engine.metering import schema
from engine.metering.database import Database, sqlite_url
from engine.metering.plans import read_spec

LEDGER = schema.ledger


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(sqlite_url(tmp_path / "hearth.db"))
    async with made.writing() as connection:
        await connection.run_sync(schema.metadata.create_all)
    yield made
    await made.close()


def customer(*, retries: bool = False, **plan: Any) -> Customer:
    return Customer("c", "hearth-key", "key_c", read_spec({"price": 3, **plan}), retries)


def answer(id: str, *, charge: int = 3, digest: str = "d") -> Outcome:
    return Outcome(sent=True, status=200, request_id=id, charge=charge, digest=digest, whole=True)


async def row(database: Database, id: str, **fields: Any) -> None:
    given = {
        "request_id": id,
        "key_id": "key_c",
        "tenant_id": "default",
        "plan_id": None,
        "model": "m",
        "category": "chat",
        "charge": 3,
        "unit": "EUR",
        "status": "answered",
        "at": 1_800_000_000_000,
        "worker": "w",
        "period": "2027-01",
    }
    async with database.writing() as connection:
        await connection.execute(insert(LEDGER).values(**(given | fields)))


async def claim(database: Database, operation: str, id: str) -> None:
    async with database.writing() as connection:
        await connection.execute(
            insert(schema.idempotency).values(
                key_id="key_c", idem_key=operation, request_hash="h", request_id=id, status=200, created_at=0
            )
        )


async def found(database: Database, *customers: Customer) -> dict[str, int]:
    """The kinds of fault that are not 0."""
    faults = Faults()
    await audit(database, customers, faults)
    told = {name: number for name, number in vars(faults).items() if name != "examples" and number}
    assert faults.good == (not told) == (not faults.examples)
    return told


async def test_books_that_agree(database: Database) -> None:
    who = customer(budget={"limit": 2, "of": "requests"})
    for id in ("a", "b"):
        who.note(answer(id))
        await row(database, id)
    who.note(Outcome(sent=True, status=429, request_id="c", code="insufficient_quota", whole=True))
    assert await found(database, who) == {}


async def test_an_answer_without_a_row_and_a_row_without_a_request(database: Database) -> None:
    who = customer()
    who.note(answer("a"))
    assert await found(database, who) == {"missing": 1}
    await row(database, "a")
    await row(database, "b")
    assert await found(database, who) == {"twice": 1}
    # With a client that was cut off the second row is explained.
    who.note(Outcome(sent=True))
    assert await found(database, who) == {}
    faults = Faults()
    assert (await audit(database, [who], faults)).unanswered == 1


async def test_a_charge_that_was_not_told_or_is_not_the_price(database: Database) -> None:
    who = customer()
    who.note(answer("a", charge=2))
    await row(database, "a")
    assert await found(database, who) == {"wrong_charge": 1}
    async with database.writing() as connection:
        await connection.execute(update(LEDGER).values(charge=2))
    assert await found(database, who) == {"wrong_charge": 1}


async def test_an_error_that_was_charged(database: Database) -> None:
    who = customer()
    who.note(Outcome(sent=True, status=503, request_id="a", whole=True))
    who.note(Outcome(sent=True))
    await row(database, "a")
    assert await found(database, who) == {"charged_errors": 1}


@pytest.mark.parametrize(
    ("plan", "fields"),
    [
        ({"budget": {"limit": 1, "of": "requests"}}, {}),
        ({"budget": {"limit": 5}}, {}),
        ({"included": 1}, {"included": True, "charge": 0}),
        ({"requests_per_day": 1}, {}),
    ],
)
async def test_one_request_over_a_limit(
    database: Database, plan: dict[str, Any], fields: dict[str, Any]
) -> None:
    who = customer(**plan)
    for id in ("a", "b"):
        who.note(answer(id, charge=fields.get("charge", 3)))
        await row(database, id, **fields)
    assert await found(database, who) == {"over": 1}


async def test_units_of_a_used_up_budget_that_nobody_had(database: Database) -> None:
    who = customer(budget={"limit": 10})
    await row(database, "a")
    faults = Faults()
    await audit_rest(database, who, faults)
    # Two more requests of 3 would have fitted beside the one.
    assert faults.unused == 2 and not faults.good


async def test_an_operation_has_one_row_however_often_it_was_tried(database: Database) -> None:
    who = customer(retries=True)
    who.note_try("o", Outcome(sent=True), stream=False)
    for _ in range(2):
        who.note_try("o", answer("a"), stream=False)
    await claim(database, "o", "a")
    assert await found(database, who) == {"missing": 1}
    await row(database, "a")
    assert await found(database, who) == {}
    await row(database, "b")
    assert (await found(database, who))["twice"] >= 1
    async with database.writing() as connection:
        await connection.execute(delete(LEDGER).where(LEDGER.c.request_id == "b"))
    again = customer(retries=True)
    again.note_try("o", answer("a"), stream=False)
    again.note_try("o", answer("a", digest="another"), stream=False)
    assert await found(database, again) == {"not_the_same": 1}
