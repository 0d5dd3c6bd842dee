"""The wallet: never over a limit by one, the last unit to whoever needs it, and quick while it holds some."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.metering.accounts import Account
from engine.metering.database import Database, DatabaseAwayError
from engine.metering.inserting import write_rows
from engine.metering.lease_store import Given, LeaseStore, Order, read_budget
from engine.metering.leases import Budget
from engine.metering.settlement import settle_worker
from engine.metering.wallet import Wallet
from tests.metering.test_ledger import Away, row

PERIOD = "2026-11"
#: Within November 2026, and after it.
INSIDE, AFTER = 1_795_000_000_000, 1_796_083_210_000


class Clock:
    """A clock in seconds that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counted(LeaseStore):
    """A store that counts its transactions."""

    trades = 0
    looks = 0

    async def trade(self, orders: Any) -> list[Given]:
        self.trades += 1
        return await super().trade(orders)

    async def look(self, names: Any) -> dict[tuple[str, str], Budget]:
        self.looks += 1
        return await super().look(names)


def wallet_of(database: Database, worker: str = "w-1", **settings: Any) -> Wallet:
    return Wallet(Counted(database, worker), **{"now_ms": lambda: INSIDE, **settings})


def store_of(wallet: Wallet) -> Counted:
    assert isinstance(wallet._store, Counted)
    return wallet._store


async def use(wallet: Wallet, account: Account, cost: int = 1) -> bool:
    """One answered request."""
    if not wallet.take(account, cost) and not await wallet.acquire(account, cost):
        return False
    wallet.spend(account, cost)
    return True


async def test_a_budget_is_used_up_to_its_last_unit_and_not_further(database: Database) -> None:
    wallet = wallet_of(database)
    account = Account("key-1", PERIOD, 10)
    assert [await use(wallet, account, 3) for _ in range(4)] == [True, True, True, False]
    assert wallet.remaining(account) == 1
    assert await use(wallet, account, 1)
    assert wallet.remaining(account) == 0
    assert not await use(wallet, account)
    # What costs nothing goes through.
    assert await use(wallet, account, 0)
    await wallet.close()
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=0, leased=10)


async def test_what_is_put_back_can_be_taken_again(database: Database) -> None:
    wallet = wallet_of(database)
    account = Account("key-1", PERIOD, 1)
    assert await wallet.acquire(account, 1)
    assert wallet.remaining(account) == 0
    assert not wallet.take(account, 1)
    wallet.put_back(account, 1)
    assert wallet.remaining(account) == 1
    assert wallet.take(account, 1)
    with pytest.raises(ValueError, match="were not taken"):
        wallet.put_back(account, 2)
    with pytest.raises(ValueError, match="nothing was taken of key-2"):
        wallet.spend(Account("key-2", PERIOD, 1), 1)
    await wallet.close()


async def test_who_comes_often_does_not_wait_for_an_account_that_has_nothing(database: Database) -> None:
    clock = Clock()
    wallet = wallet_of(database, clock=clock)
    account = Account("key-1", PERIOD, 2)
    assert [await use(wallet, account) for _ in range(3)] == [True, True, False]
    asked = store_of(wallet).trades
    assert [wallet.take(account, 1) for _ in range(100)] == [False] * 100
    assert store_of(wallet).trades == asked
    # It is looked again once a second, while nobody waits.
    clock.now += 1.1
    assert [wallet.take(account, 1) for _ in range(100)] == [False] * 100
    assert wallet._trader is not None
    await wallet._trader
    assert store_of(wallet).trades == asked + 1
    assert wallet.take(account, 1) is False
    # Who comes after a while is told what is so now.
    clock.now += 2.1
    assert wallet.take(account, 1) is None
    # So is whoever has another limit.
    assert wallet.take(Account("key-1", PERIOD, 3), 1) is None
    assert await use(wallet, Account("key-1", PERIOD, 3))
    await wallet.close()


async def test_a_busy_account_is_refilled_before_it_is_empty(database: Database) -> None:
    wallet = wallet_of(database)
    account = Account("key-1", PERIOD, 100_000)
    assert await use(wallet, account)
    for _ in range(3000):
        if wallet._trader is not None and wallet._held[account.name].purse.spare < 50:
            # As a gateway does, which waits for other things in between.
            await asyncio.wait({wallet._trader})
        assert wallet.take(account, 1)
        wallet.spend(account, 1)
        await asyncio.sleep(0)
    await wallet.close()
    assert wallet.remaining(account) == 100_000 - 3001
    assert store_of(wallet).trades <= 6


async def test_many_callers_share_one_transaction(database: Database) -> None:
    wallet = wallet_of(database)
    accounts = [Account(f"key-{number}", PERIOD, 20) for number in range(10)]
    found = await asyncio.gather(*(use(wallet, account) for account in accounts for _ in range(30)))
    await wallet.close()
    assert sum(found) == 200
    assert store_of(wallet).trades < 40


async def test_a_flood_over_budget_costs_no_database_work(database: Database) -> None:
    clock = Clock()
    wallet = wallet_of(database, clock=clock)
    account = Account("key-1", PERIOD, 5)
    assert sum([await use(wallet, account) for _ in range(6)]) == 5
    await wallet.close()
    before = store_of(wallet).trades
    assert not any([await use(wallet, account) for _ in range(500)])
    assert store_of(wallet).trades == before
    clock.now += 1.1
    assert not any([await use(wallet, account) for _ in range(500)])
    assert store_of(wallet).trades == before + 1


async def test_what_is_too_little_for_each_worker_is_enough_for_one_of_them(database: Database) -> None:
    account = Account("key-1", PERIOD, 4)
    wallets = [wallet_of(database, worker, workers=2) for worker in ("w-1", "w-2")]
    for wallet in wallets:
        assert await wallet.acquire(account, 2)
        wallet.put_back(account, 2)
    assert sorted(await asyncio.gather(*(use(wallet, account, 3) for wallet in wallets))) == [False, True]
    assert not any(await asyncio.gather(*(use(wallet, account, 3) for wallet in wallets)))
    for wallet in wallets:
        await wallet.close()
    budget = await read_budget(database, "key-1", PERIOD)
    assert budget.used + budget.leased <= 4


async def test_a_raised_limit_counts_at_once_and_a_lowered_one_too(database: Database) -> None:
    wallet = wallet_of(database)
    assert sum([await use(wallet, Account("key-1", PERIOD, 5)) for _ in range(9)]) == 5
    assert sum([await use(wallet, Account("key-1", PERIOD, 7)) for _ in range(9)]) == 2
    assert sum([await use(wallet, Account("key-1", PERIOD, 1000)) for _ in range(9)]) == 9
    assert sum([await use(wallet, Account("key-1", PERIOD, 18)) for _ in range(9)]) == 2
    assert not await use(wallet, Account("key-1", PERIOD, 3))
    assert wallet.remaining(Account("key-1", PERIOD, 3)) == 0
    await wallet.close()
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=0, leased=18)


async def test_a_soft_account_never_refuses_and_tells_how_far_over_it_is(database: Database) -> None:
    wallet = wallet_of(database)
    account = Account("key-1", PERIOD, 5, hard=False)
    assert all([await use(wallet, account, 2) for _ in range(100)])
    await wallet.close()
    assert wallet.remaining(account) == -195
    # It becomes hard: nothing more is taken.
    assert not await use(wallet, Account("key-1", PERIOD, 150), 2)
    assert await use(wallet, Account("key-1", PERIOD, 202), 2)
    await wallet.close()


async def test_without_a_database_a_hard_account_fails_and_a_soft_one_goes_on(
    url: str, database: Database
) -> None:
    away = Away(url)
    wallet = wallet_of(away)
    hard, soft = Account("key-1", PERIOD, 50), Account("key-2", PERIOD, 5, hard=False)
    away.away = True
    with pytest.raises(DatabaseAwayError, match="cannot be read"):
        await wallet.acquire(hard, 1)
    assert all([await use(wallet, soft) for _ in range(20)])
    away.away = False
    await asyncio.sleep(0.55)
    assert all([await use(wallet, hard) for _ in range(50)])
    assert not await use(wallet, hard)
    assert await use(wallet, soft)
    await wallet.close()
    assert wallet.remaining(soft) == -16
    budget = await read_budget(database, "key-2", PERIOD)
    assert budget.leased >= 21
    await away.close()


async def test_a_lost_answer_strands_nothing(database: Database) -> None:
    """The store gives and takes, but its answer does not arrive: the next trade tells the truth."""

    class Lossy(Counted):
        loses = False

        async def trade(self, orders: Any) -> list[Given]:
            given = await super().trade(orders)
            if self.loses:
                raise DatabaseAwayError("The connection was lost after the commit.")
            return given

    clock = Clock()
    store = Lossy(database, "w-1")
    wallet = Wallet(store, clock=clock, now_ms=lambda: INSIDE)
    account = Account("key-1", PERIOD, 12)
    assert await use(wallet, account)
    store.loses = True
    for _ in range(4):
        clock.now += 1
        while wallet.take(account, 1):
            wallet.spend(account, 1)
        with pytest.raises(DatabaseAwayError):
            await wallet.acquire(account, 1)
    store.loses = False
    clock.now += 1
    used = 12 - wallet.remaining(account)
    assert sum([await use(wallet, account) for _ in range(20)]) == 12 - used
    # And one that loses what is given back.
    other = Account("key-1", PERIOD, 1000)
    assert await use(wallet, other)
    store.loses = True
    clock.now += 100
    with pytest.raises(DatabaseAwayError):
        await wallet.acquire(Account("key-1", PERIOD, 20), 1)
    store.loses = False
    clock.now += 1
    assert sum([await use(wallet, Account("key-1", PERIOD, 20)) for _ in range(20)]) == 7
    await wallet.close()


async def test_idle_units_go_to_the_worker_that_needs_them(database: Database) -> None:
    clock = Clock()
    idle, busy = (wallet_of(database, f"w-{n}", clock=clock) for n in (1, 2))
    account = Account("key-1", PERIOD, 100)
    assert await use(idle, account)
    # A quarter of what is left.
    assert idle.remaining(account) == 99
    clock.now += 0.5
    await idle.tidy()
    assert (await read_budget(database, "key-1", PERIOD)).leased == 25
    clock.now += 0.6
    await idle.tidy()
    assert (await read_budget(database, "key-1", PERIOD)).leased == 1
    assert sum([await use(busy, account) for _ in range(120)]) == 99
    assert busy.remaining(account) == 0
    for wallet in (idle, busy):
        await wallet.close()


async def test_plenty_stays_with_an_idle_worker_for_a_minute(database: Database) -> None:
    clock = Clock()
    wallet = wallet_of(database, clock=clock)
    account = Account("key-1", PERIOD, 10**9)
    assert await use(wallet, account)
    for _ in range(20):
        clock.now += 2.9
        await wallet.tidy()
    assert store_of(wallet).trades == 1
    assert store_of(wallet).looks <= 7
    clock.now += 10
    await wallet.tidy()
    assert (await read_budget(database, "key-1", PERIOD)).leased == 1
    await wallet.close()


async def test_the_last_units_of_another_worker_are_waited_for(database: Database) -> None:
    holder, waiter = wallet_of(database, "w-1"), wallet_of(database, "w-2")
    account = Account("key-1", PERIOD, 4)
    for _ in range(2):
        assert await holder.acquire(account, 2)
    holder.put_back(account, 2)
    upkeep = asyncio.create_task(holder.run())
    assert await asyncio.wait_for(waiter.acquire(account, 2), 10)
    upkeep.cancel()
    # What is in the hand of a request elsewhere is not waited for.
    assert not await asyncio.wait_for(waiter.acquire(account, 2), 0.9)
    for wallet in (holder, waiter):
        await wallet.close()


async def test_a_wait_in_vain_is_not_repeated(database: Database) -> None:
    """Another worker says that it has units to spare, but never gives them back (its machine is gone)."""
    lost, waiter = wallet_of(database, "w-1"), wallet_of(database, "w-2")
    account = Account("key-1", PERIOD, 1)
    assert await lost.acquire(account, 1)
    lost.put_back(account, 1)
    await LeaseStore(database, "w-1").trade([Order("key-1", PERIOD, 1, 1)])
    began = asyncio.get_running_loop().time()
    assert not any(await asyncio.gather(*(waiter.acquire(account, 1) for _ in range(50))))
    waited = asyncio.get_running_loop().time() - began
    assert waited > 1.0
    await asyncio.sleep(1.1)
    before = store_of(waiter).trades
    for _ in range(50):
        assert not await waiter.acquire(account, 1)
    assert store_of(waiter).trades <= before + 1
    await waiter.close()


async def test_a_period_that_is_over_is_settled_from_the_ledger(database: Database) -> None:
    now = [INSIDE]
    flushed: list[bool] = []

    async def flush() -> bool:
        flushed.append(True)
        return len(flushed) > 1

    wallet = wallet_of(database, now_ms=lambda: now[0], flush=flush)
    account = Account("key-1", PERIOD, 100)
    assert await use(wallet, account, 3)
    assert await wallet.acquire(account, 3)
    await write_rows(database, [row(1)])
    await wallet.tidy()
    assert (await read_budget(database, "key-1", PERIOD)).used == 0
    now[0] = AFTER
    # One request of the period is still in hand; what is spare goes back at once.
    await wallet.tidy()
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=0, leased=6)
    assert not flushed
    await write_rows(database, [row(2)])
    wallet.spend(account, 3)
    # The journal could not be folded in; the next round does it.
    await wallet.tidy()
    assert (await read_budget(database, "key-1", PERIOD)).used == 0
    await wallet.tidy()
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=6, leased=0)
    await wallet.close()


async def test_a_clock_that_goes_back_into_a_settled_period_loses_no_count(database: Database) -> None:
    now = [AFTER]
    wallet = wallet_of(database, now_ms=lambda: now[0])
    account = Account("key-1", PERIOD, 10)
    assert await use(wallet, account, 3)
    await write_rows(database, [row(1)])
    await wallet.tidy()
    assert await read_budget(database, "key-1", PERIOD) == Budget(used=3, leased=0)
    now[0] = INSIDE
    assert await use(wallet, account, 3)
    assert wallet.remaining(account) == 4
    assert not await use(wallet, account, 5)
    assert await use(wallet, account, 4)
    await wallet.close()
    await write_rows(database, [row(2), row(3, charge=4)])
    for _ in range(2):
        await settle_worker(database, "w-1")
        assert await read_budget(database, "key-1", PERIOD) == Budget(used=10, leased=0)


async def test_a_life_that_was_thought_dead_goes_on_within_the_budget(database: Database) -> None:
    wallet = wallet_of(database)
    account = Account("key-1", PERIOD, 10)
    assert await use(wallet, account, 3)
    await write_rows(database, [row(1)])
    await settle_worker(database, "w-1")
    assert sum([await use(wallet, account) for _ in range(20)]) <= 7
    await wallet.close()
    assert wallet.remaining(account) == 0
    budget = await read_budget(database, "key-1", PERIOD)
    assert budget.used + budget.leased == 10


async def test_a_lease_ends_when_it_is_not_renewed(url: str, database: Database) -> None:
    clock, away = Clock(), Away(url)
    wallet = wallet_of(away, clock=clock)
    account = Account("key-1", PERIOD, 10**6)
    assert await use(wallet, account)
    clock.now += 600
    await wallet.renew()
    clock.now += 600
    assert wallet.take(account, 1)
    away.away = True
    clock.now += 600
    assert not wallet.take(account, 1)
    with pytest.raises(DatabaseAwayError):
        await wallet.acquire(account, 1)
    away.away = False
    clock.now += 1
    assert await wallet.acquire(account, 1)
    await wallet.close()
    await away.close()


async def test_an_account_is_forgotten_without_losing_its_count(database: Database) -> None:
    clock = Clock()
    wallet = wallet_of(database, clock=clock)
    account = Account("key-1", PERIOD, 40)
    assert await use(wallet, account, 3)
    clock.now += 2
    await wallet.tidy()
    clock.now += 700
    await wallet.tidy()
    assert not wallet._held
    assert sum([await use(wallet, account) for _ in range(50)]) == 37
    assert wallet.remaining(account) == 0
    await wallet.close()


@asynccontextmanager
async def running(wallets: list[Wallet]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(wallet.run()) for wallet in wallets]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for wallet in wallets:
            await wallet.close()


@pytest.mark.parametrize("seed", range(3))
async def test_racing_wallets_use_a_budget_exactly(url: str, database: Database, seed: int) -> None:
    """Requests of several costs, some given up, over four workers: never over; all of it can be used."""
    chance = random.Random(seed)
    limit = 400
    databases = [Database(url) for _ in range(4)]
    wallets = [wallet_of(each, f"w-{number}", workers=4) for number, each in enumerate(databases)]
    account = Account("key-1", PERIOD, limit)
    held = spent = 0

    async def caller(wallet: Wallet, cost: Callable[[], int]) -> None:
        nonlocal held, spent
        while True:
            price = cost()
            if not wallet.take(account, price) and not await wallet.acquire(account, price):
                if price == 1:
                    return
                continue
            held += price
            assert held + spent <= limit
            await asyncio.sleep(chance.uniform(0, 0.01))
            held -= price
            if chance.random() < 0.8:
                spent += price
                wallet.spend(account, price)
            else:
                wallet.put_back(account, price)

    async with running(wallets):
        async with asyncio.timeout(60):
            await asyncio.gather(
                *(caller(wallet, lambda: chance.choice((1, 1, 2, 5))) for wallet in wallets for _ in range(3))
            )
            # Whoever comes last finds all that the others left.
            # (On a slow machine, with another try: a wait for the others' units is bounded.)
            while spent < limit:
                await caller(wallets[0], lambda: 1)
    assert spent == limit
    for each in databases:
        await each.close()


async def test_cancelled_callers_hold_nothing(database: Database) -> None:
    wallet = wallet_of(database)
    account = Account("key-1", PERIOD, 10)
    callers = [asyncio.create_task(wallet.acquire(account, 1)) for _ in range(5)]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert sum([await use(wallet, account) for _ in range(20)]) == 10
    await wallet.close()


def test_the_database_is_not_needed_for_what_is_not_known() -> None:
    wallet = Wallet(LeaseStore(Database("sqlite+aiosqlite:///none"), "w-1"))
    assert wallet.remaining(Account("key-1", PERIOD, 7)) == 7
    assert not wallet.take(Account("key-1", PERIOD, 7), 1)
