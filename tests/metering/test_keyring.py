"""The keys in a gateway's memory: revoked within a second, good while the database is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from engine.metering import keys, planstore, schema, tenants
from engine.metering.database import Database
from engine.metering.keyring import KeyRing
from engine.metering.keys import Allowed
from engine.metering.migrations import migrate
from engine.metering.plans import PlanSpec


@pytest.fixture
async def store(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    await migrate(made)
    yield made
    await made.close()


async def test_revoking_is_seen_by_every_ring_within_a_second(store: Database, url: str) -> None:
    text, made = await keys.create(store)
    others = [Database(url) for _ in range(3)]
    rings = [KeyRing(other) for other in others]
    for ring in rings:
        await ring.start()
        caller = ring.find(text)
        assert caller is not None and caller.key == made and caller.state(ring.now_ms()) == "valid"
    await keys.revoke(store, made.id)
    began = time.monotonic()
    while any(ring.find(text).state(ring.now_ms()) == "valid" for ring in rings):  # type: ignore[union-attr]
        assert time.monotonic() - began < 1.0
        await asyncio.sleep(0.01)
    for ring, other in zip(rings, others, strict=True):
        await ring.close()
        await other.close()


async def test_a_ring_knows_whole_keys_only(store: Database) -> None:
    text, made = await keys.create(store)
    ring = KeyRing(store)
    assert not ring.loaded and ring.find(text) is None
    await ring.refresh()
    assert ring.loaded and len(ring) == 1
    for stranger in ("", text[:-1], text + "x", made.sha256, made.id):
        assert ring.find(stranger) is None
    assert ring.by_id(made.id) == ring.find(text) and ring.by_id("key_none") is None


async def test_a_ring_reads_only_what_is_new(store: Database) -> None:
    texts = [(await keys.create(store, name=f"{number}"))[0] for number in range(20)]
    ring = KeyRing(store)
    await ring.refresh()
    before = {text: ring.find(text) for text in texts}
    await keys.revoke(store, "7")
    await ring.refresh()
    changed = [number for number, text in enumerate(texts) if ring.find(text) is not before[text]]
    assert changed == [7]
    await tenants.create(store, "acme")
    late, _ = await keys.create(store, tenant="acme")
    await ring.refresh()
    assert ring.find(late).tenant.name == "acme" and len(ring) == 21  # type: ignore[union-attr]


async def test_a_database_restored_from_a_backup_is_read_anew(store: Database) -> None:
    text, made = await keys.create(store)
    ring = KeyRing(store)
    await ring.refresh()
    async with store.writing() as connection:
        await connection.execute(schema.keys.delete())
        await connection.execute(schema.changes.update().values(version=1))
    await ring.refresh()
    assert ring.find(text) is None and ring.by_id(made.id) is None and len(ring) == 0


async def test_expiry_and_a_closed_tenant_need_no_reading_of_the_clock_by_the_database(
    store: Database,
) -> None:
    now = time.time()
    text, _ = await keys.create(store, expires_at=int(now * 1000) + 60_000)
    ring = KeyRing(store, clock=lambda: now)
    await ring.refresh()
    caller = ring.find(text)
    assert caller is not None and caller.state(ring.now_ms()) == "valid"
    now += 60
    assert caller.state(ring.now_ms()) == "expired"
    now -= 3600  # a clock set back makes no key invalid
    assert caller.state(ring.now_ms()) == "valid"
    await tenants.close(store, "default")
    await ring.refresh()
    assert ring.find(text).state(ring.now_ms()) == "closed"  # type: ignore[union-attr]
    await tenants.reopen(store, "default")
    await ring.refresh()
    assert ring.find(text).state(ring.now_ms()) == "valid"  # type: ignore[union-attr]


async def test_the_plan_is_the_keys_own_or_its_tenants(store: Database) -> None:
    cheap = await planstore.create(store, "cheap", PlanSpec(price=1))
    gold = await planstore.create(store, "gold", PlanSpec(price=5, weight=10, counts="tenant"))
    acme = await tenants.create(store, "acme", plan="gold")
    by_tenant, _ = await keys.create(store, tenant="acme")
    own, own_key = await keys.create(store, tenant="acme", plan="cheap")
    without, _ = await keys.create(store)
    ring = KeyRing(store)
    await ring.refresh()
    found = [ring.find(text) for text in (by_tenant, own, without)]
    assert [caller.plan for caller in found if caller] == [gold, cheap, None]
    assert [caller.weight for caller in found if caller] == [10, 1, 1]
    assert found[0] is not None and found[0].subject == acme.id
    assert found[1] is not None and found[1].subject == own_key.id
    await planstore.change(store, "gold", PlanSpec(price=6))
    await ring.refresh()
    assert ring.find(by_tenant).plan.spec.price == 6  # type: ignore[union-attr]


async def test_keys_stay_good_while_the_database_is_away(
    store: Database, caplog: pytest.LogCaptureFixture
) -> None:
    text, _ = await keys.create(store)
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    ring = KeyRing(store, every_s=0.01)
    await ring.start()
    ring._database = away
    began = time.monotonic()
    while "stay in use" not in caplog.text:
        assert time.monotonic() - began < 5
        await asyncio.sleep(0.01)
    assert ring.find(text) is not None
    ring._database = store
    await keys.create(store)
    while len(ring) < 2:
        assert time.monotonic() - began < 5
        await asyncio.sleep(0.01)
    assert caplog.text.count("stay in use") == 1, "said once, not at each try"
    await ring.close()
    await away.close()


@pytest.mark.parametrize(
    ("addresses", "caller", "may"),
    [
        ((), None, True),
        (("10.0.0.0/8",), "10.1.2.3", True),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", True),
        (("10.0.0.0/8", "2001:db8::/32"), "2001:db8::1", True),
        (("10.0.0.0/8",), "11.1.2.3", False),
        (("10.0.0.0/8",), None, False),
        (("10.0.0.0/8",), "no address", False),
        (("192.168.1.7/24",), "192.168.1.200", True),
    ],
)
async def test_from_where_a_key_may_be_used(
    store: Database, addresses: tuple[str, ...], caller: str | None, may: bool
) -> None:
    text, _ = await keys.create(store, allowed=Allowed(addresses=addresses))
    ring = KeyRing(store)
    await ring.refresh()
    assert ring.find(text).may_call_from(caller) is may  # type: ignore[union-attr]


async def test_what_a_key_may_use(store: Database) -> None:
    text, _ = await keys.create(store, allowed=Allowed(models=("a", "b"), categories=("chat",)))
    ring = KeyRing(store)
    await ring.refresh()
    caller = ring.find(text)
    assert caller is not None
    assert caller.may_use("a", "chat")
    assert not caller.may_use("a", "image") and not caller.may_use("c", "chat")
