"""Tenants and plans in the database: names are unique, what is in use is not removed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from engine.metering import keys, planstore, tenants
from engine.metering.database import Database
from engine.metering.lookup import AccessError, ConflictError, NotFoundError
from engine.metering.migrations import migrate
from engine.metering.plans import Budget, PlanError, PlanSpec


@pytest.fixture
async def store(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    await migrate(made)
    yield made
    await made.close()


async def test_a_tenant_is_found_by_id_and_name_and_its_name_is_its_own(store: Database) -> None:
    acme = await tenants.create(store, " acme ")
    assert acme.name == "acme"
    assert await tenants.find(store, acme.id) == await tenants.find(store, "acme") == acme
    assert [each.name for each in await tenants.list_tenants(store)] == ["default", "acme"]
    with pytest.raises(ConflictError, match="a tenant 'acme' already"):
        await tenants.create(store, "acme")
    with pytest.raises(NotFoundError, match="Did you mean 'acme'"):
        await tenants.find(store, "acne")


async def test_an_id_wins_over_a_name_that_looks_like_it(store: Database) -> None:
    acme = await tenants.create(store, "acme")
    await tenants.create(store, acme.id)
    assert await tenants.find(store, acme.id) == acme


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "a\nb"])
async def test_a_name_that_is_none_is_refused(store: Database, name: str) -> None:
    with pytest.raises(AccessError, match="1 to 200"):
        await tenants.create(store, name)
    with pytest.raises(AccessError, match="1 to 200"):
        await planstore.create(store, name, PlanSpec())


async def test_a_tenants_plan_is_given_and_taken(store: Database) -> None:
    gold = await planstore.create(store, "gold", PlanSpec())
    await tenants.create(store, "acme", plan="gold")
    assert (await tenants.find(store, "acme")).plan_id == gold.id
    assert (await tenants.set_plan(store, "acme", None)).plan_id is None
    assert (await tenants.set_plan(store, "acme", gold.id)).plan_id == gold.id
    with pytest.raises(NotFoundError, match="no plan 'silver'"):
        await tenants.set_plan(store, "acme", "silver")


async def test_closing_keeps_its_first_time(store: Database) -> None:
    closed = await tenants.close(store, "default")
    assert closed.closed_at is not None
    assert await tenants.close(store, "default") == closed
    assert (await tenants.reopen(store, "default")).closed_at is None


async def test_a_plan_comes_back_as_it_was_written(store: Database) -> None:
    spec = PlanSpec(
        price=2,
        categories={"image": 10},
        models={"flux": 25},
        included=100,
        budget=Budget(limit=5000, of="charge", hard=False),
        requests_per_minute=60,
        weight=3,
    )
    made = await planstore.create(store, "gold", spec, unit="minor", currency="EUR")
    assert await planstore.find(store, "gold") == made and made.spec == spec
    assert await planstore.list_plans(store) == [made]
    changed = await planstore.change(store, "gold", PlanSpec(price=3))
    assert changed.spec == PlanSpec(price=3) and changed.id == made.id and changed.currency == "EUR"
    with pytest.raises(ConflictError, match="a plan 'gold' already"):
        await planstore.create(store, "gold", PlanSpec())
    with pytest.raises(PlanError, match="no ISO 4217 code"):
        await planstore.create(store, "euro", PlanSpec(), unit="minor")


async def test_a_plan_in_use_is_not_removed(store: Database) -> None:
    await planstore.create(store, "gold", PlanSpec())
    await tenants.set_plan(store, "default", "gold")
    await keys.create(store, name="app", plan="gold")
    with pytest.raises(ConflictError, match=r"that of default, key 'app'\. Give them another plan first"):
        await planstore.delete(store, "gold")
    await tenants.set_plan(store, "default", None)
    with pytest.raises(ConflictError, match="key 'app'"):
        await planstore.delete(store, "gold")
    other = await planstore.create(store, "silver", PlanSpec())
    assert await planstore.delete(store, "silver") == other
    with pytest.raises(NotFoundError):
        await planstore.find(store, "silver")
