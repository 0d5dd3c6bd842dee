"""What a worker may spend: blocks of budgets, leased before they are needed, so that admission is quick.

Budgets, included requests and requests of a day are all *accounts*. A worker takes a request's cost from what
it holds of an account, and when a third of that is left it leases the next block. All that waits for the
database at one moment (blocks, spare units to give back) is one transaction. Of a *soft* account anything can
be taken at any time: its limit is only told.

What this worker holds is always less than what the store says that it holds: where the answer to a trade was
lost, the next one tells the truth.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache

from engine.metering.accounts import Account, Held
from engine.metering.budget_rows import Name
from engine.metering.database import DatabaseAwayError, DatabaseError
from engine.metering.lease_store import Given, LeaseStore, Order
from engine.metering.leases import Budget, Purse
from engine.metering.pricing import period_end_ms

log = logging.getLogger("hearth.ledger")

#: A soft account is leased against this, which no budget reaches, in blocks for this many requests at least.
_UNBOUNDED, _SOFT_BLOCK = 2**62, 32
#: Spare units that nobody took for `_IDLE_S` go back if their budget is scarce: if what all may still lease
#: is less than so many times of it. After `_IDLE_ANYWAY_S` they go back in any case.
_IDLE_S, _IDLE_ANYWAY_S, _SCARCE, _PLENTY, _LOOK_AGAIN_S = 1.0, 60.0, 16, 1000, 10.0
#: An account that holds nothing and was not used for this long is forgotten here.
_FORGET_S = 600.0
#: How long an account is known to have nothing left, and a database that failed is not asked again.
_NOTHING_S, _FAILED_S = 1.0, 0.5
#: Longest wait for units that other workers have to spare, pause between two looks, and for the database.
_WAIT_S, _PAUSE_S, _PATIENCE_S = 1.5, 0.1, 5.0
#: Pause of `run` between two rounds; a period is over this long after its end by the clock.
_ROUND_S, _OVER_MS = 0.5, 2000


_period_end_ms = lru_cache(64)(period_end_ms)


class Wallet:
    """One life's holdings; made and used in one event loop, with `run` in the background."""

    def __init__(
        self,
        store: LeaseStore,
        *,
        workers: int = 1,
        flush: Callable[[], Awaitable[bool]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """
        Args:
            store: this life's leases.
            workers: about how many workers share a budget.
            flush: brings this worker's rows into the database, before a period that is over is settled.
            clock: seconds.
            now_ms: wall clock, Unix milliseconds.
        """
        self._store, self._workers, self._flush = store, workers, flush
        self._clock, self._now_ms = clock, now_ms
        self._held: dict[Name, Held] = {}
        #: Accounts that wait for the next trade, and the future that tells of its end.
        self._next: dict[Name, Held] = {}
        self._next_done: asyncio.Future[None] | None = None
        self._trader: asyncio.Task[None] | None = None
        self._failure, self._failed_until = "", float("-inf")

    def take(self, account: Account, cost: int) -> bool | None:
        """Takes a request's cost from what this worker holds; then once either `spend` or `put_back`.

        False: not enough is left anywhere, as of a moment ago. None: ask `acquire`.
        """
        held = self._held.get(account.name)
        if held is None or held.giving or (held.account is not account and not held.is_of(account)):
            return None
        purse = held.purse
        now = held.used_at = self._clock()
        if 0 <= cost <= purse.spare and now < purse.until:
            # `Purse.take` without the call: this is done up to three times for every request.
            purse.spare -= cost
            purse.held += cost
            if purse.spare < held.low and self._may_refill(held, now):
                self._order(account.name, held, cost)
            return True
        if purse.take(cost, now):
            return True
        if held.account.hard:
            return self._look_again(account.name, held, cost, now)
        if not held.known:
            return None
        # The next block is for it, too.
        purse.overdraw(cost)
        if self._may_refill(held, now):
            self._order(account.name, held, cost)
        return True

    async def acquire(self, account: Account, cost: int) -> bool:
        """As `take`, leasing more where needed; False: not enough is left anywhere.

        Units that other workers hold and do not use are waited for, at most 1.5 s.

        Raises:
            DatabaseAwayError: it cannot be known, since the database fails. Never for a soft account.
        """
        held = self._hold(account)
        gives_up_at: float | None = None
        while True:
            now = held.used_at = self._clock()
            if not held.giving and held.purse.take(cost):
                return True
            if now < held.nothing_until and held.elsewhere == held.vain:
                return self._nothing(held, cost)
            try:
                await self._traded(account.name, held, cost)
            except DatabaseAwayError:
                if held.account.hard:
                    raise
                return self._nothing(held, cost)
            if held.purse.take(cost):
                return True
            if self._clock() >= held.nothing_until:
                continue
            if held.account.hard and held.elsewhere and 0 < held.purse.spare < cost:
                # Too little here, and too little where the others are: together it may be enough for one.
                held.giving = True
            if gives_up_at is None:
                gives_up_at = now + _WAIT_S
            if held.elsewhere == held.vain or self._clock() >= gives_up_at:
                held.vain = held.elsewhere
                return self._nothing(held, cost)
            await asyncio.sleep(_PAUSE_S)

    def spend(self, account: Account, cost: int) -> None:
        """The request was answered and its row is durable: what was taken is gone.

        Raises:
            ValueError: it was not taken.
        """
        held = self._held.get(account.name)
        if held is None:
            raise _never_taken(account)
        held.purse.spend(cost)

    def put_back(self, account: Account, cost: int) -> None:
        """The request is not charged: what was taken can be taken again.

        Raises:
            ValueError: it was not taken.
        """
        held = self._held.get(account.name)
        if held is None:
            raise _never_taken(account)
        held.purse.put_back(cost)

    def remaining(self, account: Account) -> int:
        """What is left of the limit as this worker knows it: less than nothing only where it is soft.

        Units that other workers hold count as gone; with one worker it is exact.
        """
        held = self._held.get(account.name)
        if held is None:
            return account.limit
        purse = held.purse
        left = account.limit - held.others - purse.spent - purse.held
        return 0 if left < 0 and account.hard else left

    async def renew(self) -> None:
        """Says that this worker lives: all that it holds lasts again from now.

        Raises:
            DatabaseError: the database failed.
        """
        until = self._clock() + self._store.lasts_s
        await self._store.renew()
        for held in self._held.values():
            held.purse.until = until

    async def run(self) -> None:
        """Upkeep until it is cancelled: idle units and periods that are over."""
        while True:
            await asyncio.sleep(_ROUND_S)
            if self._clock() < self._failed_until:
                continue
            try:
                await self.tidy()
            except DatabaseError as error:
                self._fail(error)

    async def tidy(self) -> None:
        """Gives back what lies idle, and settles periods that are over.

        Raises:
            DatabaseError: the database failed; it is done the next time.
        """
        now = self._clock()
        over = [name for name in self._held if _period_end_ms(name[1]) + _OVER_MS <= self._now_ms()]
        await self._give_back([name for name in over if self._held[name].purse.spare > 0])
        await self._settle(over)
        idle = [
            name
            for name, held in self._held.items()
            if held.purse.spare > 0 and now - held.used_at > _IDLE_S and now >= held.looked_at
        ]
        if idle:
            budgets = await self._store.look(idle)
            await self._give_back([name for name, budget in budgets.items() if self._is_idle(name, budget)])
        await self._give_back([name for name, held in self._held.items() if held.doubt])
        for name, held in list(self._held.items()):
            empty = held.known and not held.purse.spare and self._is_done(name)
            if empty and now - held.used_at > _FORGET_S:
                del self._held[name]

    async def close(self) -> None:
        """Waits for a trade that is under way. What is held is settled with the life."""
        while self._trader is not None:
            await asyncio.wait({self._trader})

    def _look_again(self, name: Name, held: Held, cost: int, now: float) -> bool | None:
        """False: an account that had nothing is known to have nothing still. None: it must be asked.

        Who comes often does not wait for the next look, which is made meanwhile.
        """
        if held.elsewhere != held.vain or now >= held.nothing_until + _NOTHING_S:
            return None
        if self._may_refill(held, now):
            self._order(name, held, cost)
        return False

    def _may_refill(self, held: Held, now: float) -> bool:
        asked = held.wanted or held.trade is not None
        return not asked and now >= held.nothing_until and now >= self._failed_until

    def _hold(self, account: Account) -> Held:
        """What is held of an account; a changed limit gives the spare units back before anything is taken."""
        held = self._held.get(account.name)
        if held is None:
            held = self._held[account.name] = Held(Purse(self._clock), account)
        if not held.is_of(account):
            held.account, held.giving = account, True
            held.nothing_until, held.vain = float("-inf"), 0
        return held

    def _nothing(self, held: Held, cost: int) -> bool:
        if not held.account.hard:
            held.purse.overdraw(cost)
        return not held.account.hard

    def _is_idle(self, name: Name, budget: Budget) -> bool:
        """Whether an account's spare units shall go back, now that its budget was looked at."""
        held = self._held.get(name)
        if held is None or held.purse.spare <= 0:
            return False
        now = self._clock()
        held.others = budget.used + budget.leased - held.purse.granted
        room = held.account.limit - budget.used - budget.leased
        held.looked_at = now + (_LOOK_AGAIN_S if room > _PLENTY * held.purse.spare else _IDLE_S)
        idle_s = now - held.used_at
        return idle_s > _IDLE_ANYWAY_S or (idle_s > _IDLE_S and room < _SCARCE * held.purse.spare)

    async def _give_back(self, names: Iterable[Name]) -> None:
        done = None
        for name in names:
            held = self._held[name]
            held.giving = True
            done = self._order(name, held, 0)
        if done is not None:
            await asyncio.wait({done})

    async def _settle(self, names: list[Name]) -> None:
        if not any(self._is_done(name) for name in names):
            return
        if self._flush is not None and not await self._flush():
            return
        # Whoever is late for a period that is over has it opened again, and it is settled once more.
        gone = {name: self._held.pop(name) for name in names if self._is_done(name)}
        try:
            await self._store.settle(name for name, held in gone.items() if held.known)
        except DatabaseError:
            self._held = {**gone, **self._held}
            raise

    def _is_done(self, name: Name) -> bool:
        held = self._held[name]
        return not held.purse.held and not held.wanted and held.trade is None

    async def _traded(self, name: Name, held: Held, cost: int) -> None:
        """Waits until the store has answered.

        Raises:
            DatabaseAwayError: it did not, or failed, now or a moment ago.
        """
        if self._clock() < self._failed_until:
            raise DatabaseAwayError(self._failure)
        done = held.trade
        if done is None or held.giving:
            done = self._order(name, held, cost)
        # Not the future itself: a caller that is cancelled must not cancel it for the others.
        await asyncio.wait({done}, timeout=_PATIENCE_S)
        if not done.done():
            raise DatabaseAwayError(f"the ledger's database did not answer within {_PATIENCE_S:g} s.")
        done.result()

    def _order(self, name: Name, held: Held, cost: int) -> asyncio.Future[None]:
        """Has an account in the next trade, which begins as soon as the one under way has ended."""
        held.wanted = max(held.wanted, cost)
        self._next[name] = held
        if self._next_done is None:
            self._next_done = asyncio.get_running_loop().create_future()
            # Where nobody waits for a failure, it is no forgotten exception.
            self._next_done.add_done_callback(lambda future: future.cancelled() or future.exception())
        if self._trader is None:
            self._trader = asyncio.create_task(self._trade_all())
        return self._next_done

    async def _trade_all(self) -> None:
        try:
            while self._next_done is not None:
                wanting, done = self._next, self._next_done
                self._next, self._next_done = {}, None
                for held in wanting.values():
                    held.trade = done
                try:
                    await self._trade(wanting)
                except Exception as error:  # Whatever it was: those who wait must be told.
                    self._fail(error)
                    done.set_exception(DatabaseAwayError(self._failure))
                else:
                    done.set_result(None)
                for held in wanting.values():
                    held.trade = None
        finally:
            self._trader = None

    async def _trade(self, wanting: dict[Name, Held]) -> None:
        asked_at, orders = self._clock(), []
        for (subject, period), held in wanting.items():
            back = max(0, held.purse.spare) if held.giving else 0
            held.purse.spare -= back
            cost = held.wanted + max(0, -held.purse.spare) if held.wanted else 0
            orders.append(
                Order(
                    subject,
                    period,
                    limit=held.account.limit if held.account.hard else _UNBOUNDED,
                    share_of=held.account.limit,
                    back=back,
                    cost=cost if held.account.hard else cost * _SOFT_BLOCK,
                    workers=self._workers,
                    unspared=held.purse.spent + held.purse.held,
                )
            )
            held.giving, held.wanted, held.doubt = False, 0, True
        for order, held, given in zip(orders, wanting.values(), await self._store.trade(orders), strict=True):
            self._apply(held, order, given)
            held.purse.until = asked_at + self._store.lasts_s

    def _apply(self, held: Held, order: Order, given: Given) -> None:
        purse = held.purse
        if not held.known:
            # A lease that was settled too early, or forgotten here: all of it was spent.
            purse.spent += given.before
        held.known, held.doubt = True, False
        purse.spare = given.before + given.units - purse.held - purse.spent
        purse.short = 0
        held.others = given.budget.used + given.budget.leased - purse.granted
        if given.units:
            held.low, held.vain, held.elsewhere = given.units / 3, 0, 0
            held.nothing_until = float("-inf")
        elif order.cost:
            held.elsewhere = given.elsewhere
            held.nothing_until = self._clock() + _NOTHING_S

    def _fail(self, error: Exception) -> None:
        self._failure = f"What is left of budgets cannot be read: {error}"
        self._failed_until = self._clock() + _FAILED_S
        log.warning("%s", self._failure)


def _never_taken(account: Account) -> ValueError:
    return ValueError(f"nothing was taken of {account.subject} in {account.period}.")
