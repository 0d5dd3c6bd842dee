"""Leases: never over the budget by one, nothing lost for good, whatever workers do and whenever they die."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.metering.leases import Budget, Lease, Purse, block, give_back, grant, settle

UNITS = st.integers(0, 30)
PICK = st.integers(0, 10**6)


class Life:
    """One life of a worker: its purse, the store's lease, the costs in hand and what it wrote."""

    def __init__(self) -> None:
        self.purse = Purse(clock=lambda: 0.0, until=1.0)
        self.lease = Lease()
        self.in_hand: list[int] = []
        self.written = 0
        #: Rows in a journal that nobody has read yet.
        self.journaled = 0


class Workers(RuleBasedStateMachine):
    """Random workers lease, use, fail, give back, die and are settled, with a budget that changes."""

    @initialize(limit=st.integers(0, 200))
    def begin(self, limit: int) -> None:
        self.limit = self.highest = limit
        self.budget = Budget()
        self.living: list[Life] = [Life(), Life(), Life()]
        self.dead: list[Life] = []

    def _one(self, pick: int) -> Life:
        return self.living[pick % len(self.living)]

    @rule(pick=PICK, wish=UNITS)
    def lease(self, pick: int, wish: int) -> None:
        life = self._one(pick)
        self.budget, life.lease, units = grant(self.budget, life.lease, wish, self.limit)
        assert units <= wish
        life.purse.credit(units, 1.0)

    @rule(pick=PICK, cost=UNITS)
    def take(self, pick: int, cost: int) -> None:
        life = self._one(pick)
        could = cost <= life.purse.spare
        assert life.purse.take(cost) is could
        if could:
            life.in_hand.append(cost)

    @rule(pick=PICK, answered=st.booleans(), journaled=st.booleans())
    def end(self, pick: int, answered: bool, journaled: bool) -> None:
        life = self._one(pick)
        if not life.in_hand:
            return
        cost = life.in_hand.pop()
        if not answered:
            life.purse.put_back(cost)
            return
        if journaled:
            life.journaled += cost
        else:
            life.written += cost
        life.purse.spend(cost)

    @rule(pick=PICK)
    def give(self, pick: int) -> None:
        life = self._one(pick)
        self.budget, life.lease = give_back(self.budget, life.lease, life.purse.release())
        assert life.purse.spare == 0

    @rule(pick=PICK, durable=st.booleans())
    def die(self, pick: int, durable: bool) -> None:
        life = self._one(pick)
        self.living.remove(life)
        if life.in_hand and durable:
            # Killed after its row was written and before its client heard of it.
            life.written += life.in_hand.pop()
        self.dead.append(life)
        self.living.append(Life())

    @precondition(lambda self: self.dead)
    @rule(pick=PICK)
    def recover(self, pick: int) -> None:
        life = self.dead[pick % len(self.dead)]
        life.written += life.journaled
        life.journaled = 0
        for _ in range(2):
            # Twice: the one who settled may have died before it said so.
            self.budget, life.lease = settle(self.budget, life.lease, life.written)
        assert life.lease.used == life.written

    @rule(limit=st.integers(0, 200))
    def change_limit(self, limit: int) -> None:
        self.limit = limit
        self.highest = max(self.highest, limit)

    @invariant()
    def never_over(self) -> None:
        if not hasattr(self, "budget"):
            return
        everyone = self.living + self.dead
        spent = sum(life.written + life.journaled for life in everyone)
        promised = sum(sum(life.in_hand) for life in self.living)
        assert spent + promised <= self.highest
        assert self.budget.used + self.budget.leased <= self.highest
        assert self.budget.leased == sum(life.lease.granted for life in everyone if not life.lease.settled)
        assert self.budget.used == sum(life.lease.used for life in everyone if life.lease.settled)

    def teardown(self) -> None:
        if not hasattr(self, "budget"):
            return
        # Everybody leaves: exactly what was written is used, and all the rest can be leased again.
        everyone = self.living + self.dead
        for life in everyone:
            life.written += life.journaled
            self.budget, life.lease = settle(self.budget, life.lease, life.written)
        total = sum(life.written for life in everyone)
        assert self.budget == Budget(used=total, leased=0)
        assert self.budget.room(self.highest) == self.highest - total


Workers.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWorkers = Workers.TestCase


def test_the_last_unit_goes_to_one_worker() -> None:
    budget, first, units = grant(Budget(used=9), Lease(), 5, 10)
    assert units == 1
    budget, _, units = grant(budget, Lease(), 5, 10)
    assert units == 0
    budget, first = settle(budget, first, 0)
    assert budget.room(10) == 1


def test_rows_that_come_late_are_counted_once() -> None:
    budget, lease, _ = grant(Budget(), Lease(), 10, 10)
    budget, lease = settle(budget, lease, 3)
    assert budget == Budget(used=3)
    budget, lease = settle(budget, lease, 5)
    assert budget == Budget(used=5)


def test_a_settled_life_leases_nothing() -> None:
    budget, lease = settle(Budget(), Lease(), 0)
    with pytest.raises(ValueError, match="found dead"):
        grant(budget, lease, 1, 10)
    assert give_back(budget, lease, 3) == (budget, lease)


def test_nobody_gives_back_more_than_was_granted() -> None:
    budget, lease, _ = grant(Budget(), Lease(), 4, 10)
    with pytest.raises(ValueError, match="cannot be given back"):
        give_back(budget, lease, 5)
    with pytest.raises(ValueError, match="cannot be leased"):
        grant(budget, lease, -1, 10)


def test_a_purse_past_its_end_admits_nothing() -> None:
    now = [0.0]
    purse = Purse(clock=lambda: now[0])
    purse.credit(5, until=10.0)
    assert purse.take(1)
    now[0] = 10.0
    assert not purse.take(1)
    purse.spend(1)
    assert (purse.spent, purse.held, purse.spare) == (1, 0, 4)


def test_a_purse_refuses_what_makes_no_sense() -> None:
    purse = Purse(clock=lambda: 0.0, until=1.0)
    with pytest.raises(ValueError, match="cannot cost"):
        purse.take(-1)
    with pytest.raises(ValueError, match="were not taken"):
        purse.put_back(1)
    assert not purse.take(3)
    assert purse.short == 3


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 64), st.integers(0, 1000))
def test_blocks_shrink_with_the_budget_and_hold_one_request(
    limit: int, used: int, workers: int, cost: int
) -> None:
    units = block(limit, used, workers, cost)
    assert units >= cost
    assert units <= max(cost, max(0, limit - used) // 4)
