"""Which plan applies to a key or tenant, and what of it is used; on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.metering import keys, planstore, tenants
from engine.metering.callers import caller_of, key_standing, tenant_standing
from engine.metering.database import Database
from engine.metering.keyring import KeyRing
from engine.metering.ledger import write_rows
from engine.metering.lookup import NotFoundError
from engine.metering.migrations import migrate
from engine.metering.plans import Budget, PlanSpec
from engine.metering.pricing import period_name
from engine.metering.rows import LedgerRow

NOW = 1_795_552_609_000


def row(id: str, key: keys.Key, *, at: int = NOW, charge: int = 5, **more: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "request_id": id,
        "key_id": key.id,
        "tenant_id": key.tenant_id,
        "model": "smol",
        "category": "chat",
        "charge": charge,
        "unit": "credits",
        "at": at,
        "period": period_name("month", at),
        "worker": "w",
    }
    return LedgerRow(**(values | more))


@pytest.fixture
async def store(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    await migrate(made)
    yield made
    await made.close()


async def test_the_plan_is_the_same_as_the_gateways(store: Database) -> None:
    await planstore.create(store, "gold", PlanSpec(price=5))
    await planstore.create(store, "own", PlanSpec(price=1))
    await tenants.create(store, "acme", plan="gold")
    texts = [
        (await keys.create(store, tenant="acme"))[0],
        (await keys.create(store, tenant="acme", plan="own"))[0],
        (await keys.create(store))[0],
    ]
    ring = KeyRing(store)
    await ring.refresh()
    for text in texts:
        assert await caller_of(store, await keys.find(store, text)) == ring.find(text)


async def test_a_keys_standing_is_the_ledgers(store: Database) -> None:
    await planstore.create(store, "gold", PlanSpec(price=5, included=3, budget=Budget(limit=100)))
    await tenants.create(store, "acme", plan="gold")
    _, key = await keys.create(store, tenant="acme", name="one")
    _, other = await keys.create(store, tenant="acme", name="other")
    rows = [row("a", key), row("b", key, charge=0, included=True), row("c", other, charge=7)]
    await write_rows(store, [*rows, row("d", key, at=NOW - 90 * 86_400_000)])
    caller, standing = await key_standing(store, "one", NOW)
    assert caller.plan is not None and caller.plan.name == "gold" and standing is not None
    assert (standing.period, standing.requests, standing.charge) == ("2026-11", 2, 5)
    assert (standing.included_left, standing.budget_left) == (2, 95)
    _, plan, of_tenant = await tenant_standing(store, "acme", NOW)
    assert plan == caller.plan and of_tenant is None, "each key counts by itself"
    with pytest.raises(NotFoundError):
        await key_standing(store, "nobody", NOW)


async def test_a_tenants_standing_is_that_of_all_its_keys(store: Database) -> None:
    spec = PlanSpec(price=5, counts="tenant", budget=Budget(limit=2, of="requests", hard=False))
    await planstore.create(store, "gold", spec)
    await tenants.create(store, "acme", plan="gold")
    made = [(await keys.create(store, tenant="acme", name=name))[1] for name in ("one", "two")]
    await write_rows(store, [row(f"{key.id}-{number}", key) for key in made for number in range(2)])
    _, _, standing = await tenant_standing(store, "acme", NOW)
    assert standing is not None and (standing.requests, standing.charge) == (4, 20)
    assert (standing.budget_used, standing.budget_left) == (4, 0)
    assert (await key_standing(store, "one", NOW))[1] == standing
    await tenants.set_plan(store, "acme", None)
    assert (await tenant_standing(store, "acme", NOW))[1:] == (None, None)
    assert (await key_standing(store, "one", NOW))[1] is None
