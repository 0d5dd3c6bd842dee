"""Exact budgets over workers: the arithmetic, without a database.

A *budget* belongs to a subject (a key or a tenant) in a period. A worker may only spend what it leased from
it: the store grants no more than `limit - used - leased`, so that all workers together cannot be over by one,
whatever each of them does and whenever it dies. `used` is what settled leases spent; a lease is settled from
the ledger's rows (`lease_store.py`), so a worker that was killed costs the budget only what it truly wrote.

A lease names one life of a worker. Who settles it must know that this life is over and that its journal is
in the ledger, or rows could turn up after the settlement: `recovery.py` does both under the journal's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

#: Requests that one block holds at most: at four thousand requests a second, a lease a second.
_MOST_BLOCK = 4096


@dataclass(frozen=True)
class Budget:
    """One subject's budget in one period, in whole units (requests, or what a request is charged in)."""

    used: int = 0
    leased: int = 0

    def __post_init__(self) -> None:
        assert self.used >= 0, "a budget cannot be used less than not at all"
        assert self.leased >= 0, "a budget cannot be leased less than not at all"

    def room(self, limit: int) -> int:
        """What may still be leased; 0 where a lowered limit is below what is used already."""
        return max(0, limit - self.used - self.leased)


@dataclass(frozen=True)
class Lease:
    """What one life of a worker holds of a budget: `granted` in all.

    `used` is what the ledger says once it is settled; before, what the worker last said was not to spare.
    """

    granted: int = 0
    used: int = 0
    settled: bool = False


def grant(budget: Budget, lease: Lease, wish: int, limit: int) -> tuple[Budget, Lease, int]:
    """Adds up to `wish` units to a lease; the last value is how many were granted, 0 when nothing is left.

    Raises:
        ValueError: the lease is settled (its worker was thought dead), or the wish is negative.
    """
    if wish < 0:
        raise ValueError(f"{wish} units cannot be leased.")
    if lease.settled:
        raise ValueError("this lease is settled: its worker was found dead. Take a new life.")
    units = min(wish, budget.room(limit))
    return (
        replace(budget, leased=budget.leased + units),
        replace(lease, granted=lease.granted + units),
        units,
    )


def give_back(budget: Budget, lease: Lease, units: int) -> tuple[Budget, Lease]:
    """Returns units that the worker holds and has not spent; a settled lease has nothing to give.

    Raises:
        ValueError: more than was granted.
    """
    if lease.settled:
        return budget, lease
    if not 0 <= units <= lease.granted:
        raise ValueError(f"{units} units cannot be given back of a lease of {lease.granted}.")
    return replace(budget, leased=budget.leased - units), replace(lease, granted=lease.granted - units)


def reopen(budget: Budget, lease: Lease) -> tuple[Budget, Lease]:
    """Opens a settled lease again, with what was spent under it as granted and used.

    For a life that goes on in a period that seemed over, after its clock went back, or that was thought dead.
    """
    if not lease.settled:
        return budget, lease
    return (
        Budget(used=budget.used - lease.used, leased=budget.leased + lease.used),
        Lease(granted=lease.used, used=lease.used),
    )


def settle(budget: Budget, lease: Lease, spent: int) -> tuple[Budget, Lease]:
    """Ends a lease with what the ledger says was spent under it.

    Settling again corrects it: rows of a machine that was away can come in later, and each time the whole
    sum is given, so nothing is counted twice.
    """
    leased = budget.leased if lease.settled else budget.leased - lease.granted
    before = lease.used if lease.settled else 0
    return (
        Budget(used=budget.used - before + spent, leased=leased),
        Lease(granted=max(lease.granted, spent), used=spent, settled=True),
    )


@dataclass(slots=True)
class Purse:
    """A worker's side of one lease: admits a request only with its cost in hand.

    `take` before a request is sent on; then once either `spend` (it was answered; call it when its row is
    durable) or `put_back`. `until` is when the lease ends by the worker's own clock, with a margin: past it
    nothing is taken, since the lease may have been settled.
    """

    clock: Callable[[], float]
    until: float = float("-inf")
    #: Units that are neither spent nor in the hand of a request; those in hand; and those that are gone.
    spare: int = 0
    held: int = 0
    spent: int = 0
    #: Units that were asked for and not had since the last grant: how much the next block must hold at least.
    short: int = 0

    @property
    def granted(self) -> int:
        """All units of the lease."""
        return self.spare + self.held + self.spent

    def credit(self, units: int, until: float) -> None:
        """Takes a grant in."""
        self.spare += units
        self.until = until
        self.short = 0

    def take(self, cost: int, now: float | None = None) -> bool:
        """Reserves a request's cost; False: ask the store for more, and refuse the request if it has none.

        `now`: what the clock says, where the caller has looked at it already.
        """
        if cost < 0:
            raise ValueError(f"a request cannot cost {cost}.")
        if cost > self.spare or (self.clock() if now is None else now) >= self.until:
            self.short = max(self.short, cost)
            return False
        self.spare -= cost
        self.held += cost
        return True

    def overdraw(self, cost: int) -> None:
        """Reserves a cost that is not leased yet: `spare` may go below nothing."""
        self.spare -= cost
        self.held += cost

    def spend(self, cost: int) -> None:
        """The request was answered: its cost is gone."""
        if cost > self.held:
            raise self._not_taken(cost)
        self.held -= cost
        self.spent += cost

    def put_back(self, cost: int) -> None:
        """The request is not charged: its cost can be taken again."""
        if cost > self.held:
            raise self._not_taken(cost)
        self.held -= cost
        self.spare += cost

    def release(self) -> int:
        """Empties what is spare, to be given back to the store; the units in hand stay."""
        units, self.spare = self.spare, 0
        return units

    def _not_taken(self, cost: int) -> ValueError:
        return ValueError(f"{cost} units were not taken: only {self.held} are in hand.")


def block(limit: int, used: int, workers: int, cost: int) -> int:
    """How many units a worker should ask for at once.

    A share of what is left that becomes smaller as the budget runs out, so that the last units are not
    stranded with workers that do not need them; at least what one request costs.
    """
    left = max(0, limit - used)
    return max(cost, min(left // (4 * max(1, workers)), _MOST_BLOCK * max(1, cost)))
