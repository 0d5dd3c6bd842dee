"""Leases in both databases, and what becomes of a dead worker's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.metering.database import Database
from engine.metering.journal import Journal, JournalError
from engine.metering.lease_store import LeaseStore, Order, read_budget, settle_expired, settle_worker
from engine.metering.leases import Budget
from engine.metering.ledger import write_rows
from engine.metering.recovery import Recovered, begin_life, end_life, recover
from engine.metering.rows import encode
from engine.metering.settlement import REQUESTS
from tests.metering.test_ledger import count, row

PERIOD = "2026-11"


async def test_racing_workers_get_no_more_than_there_is(url: str, database: Database) -> None:
    databases = [Database(url) for _ in range(4)]
    stores = [LeaseStore(each, f"w-{number}") for number, each in enumerate(databases)]
    granted = await asyncio.gather(
        *(store.lease("key-1", PERIOD, 7, 50) for store in stores for _ in range(4))
    )
    assert sum(granted) == 50
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=0, leased=50)
    for each in databases:
        await each.close()


async def test_what_is_given_back_can_be_leased_by_another(database: Database) -> None:
    one, two = LeaseStore(database, "w-1"), LeaseStore(database, "w-2")
    assert await one.lease("key-1", PERIOD, 10, 10) == 10
    assert await two.lease("key-1", PERIOD, 1, 10) == 0
    await one.give_back("key-1", PERIOD, 4)
    assert await two.lease("key-1", PERIOD, 9, 10) == 4
    with pytest.raises(ValueError, match="cannot be given back"):
        await one.give_back("key-1", PERIOD, 7)


@pytest.mark.parametrize(("subject", "used"), [("key-1", 6), ("ten-1", 6), ("ten-1" + REQUESTS, 2)])
async def test_a_dead_workers_lease_costs_what_the_ledger_says(
    database: Database, subject: str, used: int
) -> None:
    store = LeaseStore(database, "w-1")
    assert await store.lease(subject, PERIOD, 20, 20) == 20
    other_worker, other_period = row(3, worker="w-2"), row(4, period="2026-12")
    await write_rows(database, [row(1), row(2), other_worker, other_period])
    for _ in range(2):
        assert await settle_worker(database, "w-1") == 1
        assert await read_budget(database, subject, PERIOD) == Budget(used=used, leased=0)
    with pytest.raises(ValueError, match="found dead"):
        await store.lease(subject, PERIOD, 1, 20)


async def test_a_killed_worker_is_recovered_with_its_journal(tmp_path: Path, database: Database) -> None:
    folder = tmp_path / "journal"
    worker, journal = begin_life(folder, most_bytes=100_000)
    store = LeaseStore(database, worker)
    await store.lease("key-1", PERIOD, 20, 20)
    await write_rows(database, [row(1, worker=worker)])
    journal.append([encode(row(1, worker=worker)), encode(row(2, worker=worker))])
    # While it lives nobody touches it.
    assert await recover(database, folder, most_bytes=100_000) == []
    journal.close()
    assert await recover(database, folder, most_bytes=100_000) == [Recovered(worker, 2, 1)]
    assert await count(database) == (2, 6)
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=6, leased=0)
    assert list(folder.iterdir()) == []


async def test_a_worker_that_ends_in_order_leaves_nothing(tmp_path: Path, database: Database) -> None:
    worker, journal = begin_life(tmp_path / "journal", most_bytes=100_000)
    await LeaseStore(database, worker).lease("key-1", PERIOD, 20, 20)
    await write_rows(database, [row(1, worker=worker)])
    await end_life(database, worker, journal)
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=3, leased=0)
    assert list((tmp_path / "journal").iterdir()) == []


async def test_a_worker_that_ends_with_rows_in_its_journal_is_recovered_later(
    tmp_path: Path, database: Database
) -> None:
    worker, journal = begin_life(tmp_path, most_bytes=100_000)
    journal.append([encode(row(1, worker=worker))])
    with pytest.raises(JournalError, match="still holds rows"):
        await end_life(database, worker, journal)
    assert await recover(database, tmp_path, most_bytes=100_000) == [Recovered(worker, 1, 0)]


async def test_a_machine_that_does_not_come_back_holds_nothing_for_good(
    tmp_path: Path, database: Database
) -> None:
    now = [1_000_000]
    store = LeaseStore(database, "w-1", lasts_s=10, clock=lambda: now[0])
    living = LeaseStore(database, "w-2", lasts_s=10, clock=lambda: now[0])
    await store.lease("key-1", PERIOD, 10, 20)
    await living.lease("key-1", PERIOD, 10, 20)
    now[0] += 69_000
    await living.renew()
    assert await settle_expired(database, grace_s=60, clock=lambda: now[0]) == []
    now[0] += 2_000
    assert await settle_expired(database, grace_s=60, clock=lambda: now[0]) == ["w-1"]
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=0, leased=10)
    # It comes back after all: its rows are counted, once.
    with Journal(tmp_path / "w-1.journal", most_bytes=10_000) as journal:
        journal.append([encode(row(1))])
    await recover(database, tmp_path, most_bytes=10_000)
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=3, leased=10)


async def test_what_a_server_granted_after_the_end_of_a_life_is_settled(
    tmp_path: Path, database: Database
) -> None:
    """The transaction was on its way when the worker was killed."""
    worker, journal = begin_life(tmp_path, most_bytes=100_000)
    await write_rows(database, [row(1, worker=worker)])
    await end_life(database, worker, journal)
    await LeaseStore(database, "w-living").lease("key-1", PERIOD, 2, 20)
    assert await LeaseStore(database, worker).trade([Order("key-1", PERIOD, 20, 20, cost=5)])
    assert await settle_expired(database, grace_s=60) == [worker]
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=3, leased=2)


@pytest.mark.parametrize(
    ("subject", "period", "used"),
    [
        ("key-1", PERIOD, 5),
        ("ten-1", PERIOD, 12),
        ("key-1#requests", PERIOD, 3),
        ("ten-1#requests", PERIOD, 4),
        ("key-1#included", PERIOD, 1),
        ("ten-1#included", PERIOD, 2),
        ("key-1#day", "2026-11-24", 2),
        ("key-1#day", "2026-11-25", 1),
        ("ten-1#day", "2026-11-24", 2),
        ("ten-1#day", "2026-11-25", 2),
    ],
)
async def test_each_kind_of_account_counts_its_own(
    database: Database, subject: str, period: str, used: int
) -> None:
    """Charges, requests, included requests, and requests of a day by when they were admitted."""
    midnight = 1_795_564_800_000
    await LeaseStore(database, "w-1").trade([Order(subject, period, 100, 100, cost=1)])
    await write_rows(
        database,
        [
            row(1, at=midnight - 1, charge=5),
            row(2, at=midnight - 86_400_000, charge=0, included=True),
            row(3, at=midnight, charge=0),
            row(4, at=midnight + 86_399_999, charge=7, key_id="key-2", included=True),
            row(5, at=midnight, worker="w-2"),
        ],
    )
    await settle_worker(database, "w-1")
    assert await read_budget(database, subject, period) == Budget(used=used, leased=0)


async def test_a_key_of_its_tenants_name_counts_once(database: Database) -> None:
    await LeaseStore(database, "w-1").trade([Order("same", PERIOD, 100, 100, cost=1)])
    await write_rows(database, [row(1, key_id="same", tenant_id="same")])
    await settle_worker(database, "w-1")
    assert await read_budget(database, "same", PERIOD) == Budget(used=3, leased=0)


async def test_many_orders_are_one_transaction(database: Database) -> None:
    store = LeaseStore(database, "w-1")
    orders = [Order(f"key-{number}", PERIOD, 8, 8, cost=2) for number in range(700)]
    given = await store.trade(orders)
    assert {each.units for each in given} == {2}
    back = [Order(f"key-{number}", PERIOD, 8, 8, back=1, unspared=1) for number in range(700)]
    assert {each.budget for each in await store.trade(back)} == {Budget(used=0, leased=1)}
    budgets = await store.look([(order.subject, PERIOD) for order in orders])
    assert set(budgets.values()) == {Budget(used=0, leased=1)}


async def test_racing_trades_grant_no_more_than_there_is(url: str, database: Database) -> None:
    databases = [Database(url) for _ in range(4)]
    stores = [LeaseStore(each, f"w-{number}") for number, each in enumerate(databases)]
    # In opposite orders, which must not deadlock.
    names = ["key-1", "key-2", "key-3"]
    given = await asyncio.gather(
        *(
            store.trade([Order(name, PERIOD, 50, 50, cost=7) for name in (names, names[::-1])[number % 2]])
            for number, store in enumerate(stores * 4)
        )
    )
    assert sum(each.units for some in given for each in some) == 150
    for name in names:
        assert await read_budget(database, name, PERIOD) == Budget(used=0, leased=50)
    for each in databases:
        await each.close()
