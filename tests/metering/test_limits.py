"""Requests per minute and at once: against a naive model, at the edges, and as the table comes and goes."""

from __future__ import annotations

import math
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import ApiError
from engine.metering.limits import Admitted, Limits, Refused

SECOND = 10**9
MINUTE = 60 * SECOND


class Clock:
    """Nanoseconds that pass when told."""

    def __init__(self) -> None:
        self.now = 5 * MINUTE

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += math.ceil(seconds * SECOND)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], Limits]]:
    """Makes workers with a common table."""
    made: list[Limits] = []

    def worker() -> Limits:
        made.append(Limits(tmp_path / "run" / "limits", clock=clock, rows=16, seats=4))
        return made[-1]

    yield worker
    for each in made:
        each.close()


def test_a_minutes_requests_at_once_then_one_by_one(make: Callable[[], Limits], clock: Clock) -> None:
    one, two = make(), make()
    for used in range(1, 601):
        told = (one, two)[used % 2].admit("k", per_minute=600, concurrent=None)
        assert told == Admitted(600, 600 - used, pytest.approx(used / 10))
    for _ in range(3):
        assert two.admit("k", per_minute=600, concurrent=None) == Refused("per_minute", 600, 0.1, 0, 60.0)
    clock.wait(0.0995)
    assert one.admit("k", per_minute=600, concurrent=None) == Refused(
        "per_minute", 600, 0.001, 0, pytest.approx(59.9005)
    )
    clock.wait(0.001)
    assert isinstance(one.admit("k", per_minute=600, concurrent=None), Admitted)
    clock.wait(60)
    assert one.look("k", per_minute=600) == Admitted(600, 600, 0.0)


@pytest.mark.parametrize("per_minute", [1, 7, 59, 60, 61, 1000, 12_345])
def test_what_is_told_is_true(make: Callable[[], Limits], clock: Clock, per_minute: int) -> None:
    limits = make()
    for _ in range(per_minute):
        assert isinstance(limits.admit("k", per_minute=per_minute, concurrent=None), Admitted)
    for _ in range(5):
        refused = limits.admit("k", per_minute=per_minute, concurrent=None)
        assert isinstance(refused, Refused)
        assert refused.retry_after_ms == math.ceil(refused.retry_after_s * 1000)
        clock.wait(refused.retry_after_s - 0.001)
        if refused.retry_after_ms > 1:
            assert isinstance(limits.admit("k", per_minute=per_minute, concurrent=None), Refused)
        clock.wait(0.001)
        assert isinstance(limits.admit("k", per_minute=per_minute, concurrent=None), Admitted)
    told = limits.look("k", per_minute=per_minute)
    clock.wait(told.reset_s - 0.001)
    assert limits.look("k", per_minute=per_minute).reset_s > 0
    clock.wait(0.001)
    assert limits.look("k", per_minute=per_minute) == Admitted(per_minute, per_minute, 0.0)


def test_no_limits_cost_and_tell_nothing(make: Callable[[], Limits]) -> None:
    limits = make()
    for _ in range(100):
        assert limits.admit("k", per_minute=None, concurrent=None) == Admitted(None, None, 0.0)
    assert limits.in_hand("k") == 0
    assert limits.look("k", per_minute=None) == Admitted(None, None, 0.0)


def test_the_highest_limit_of_a_plan_is_no_obstacle(make: Callable[[], Limits]) -> None:
    told = make().admit("k", per_minute=10**12, concurrent=10**12)
    assert told == Admitted(10**12, 10**12 - 1, pytest.approx(60e-9))


def test_a_refusal_of_concurrency_takes_no_token(make: Callable[[], Limits]) -> None:
    one, two = make(), make()
    assert one.admit("k", per_minute=10, concurrent=1) == Admitted(10, 9, 6.0)
    for _ in range(20):
        assert two.admit("k", per_minute=10, concurrent=1) == Refused("concurrent", 1, 1.0, 9, 6.0)
    one.leave("k")
    assert two.admit("k", per_minute=10, concurrent=1) == Admitted(10, 8, 12.0)


def test_a_refusal_of_the_rate_leaves_concurrency_alone(make: Callable[[], Limits]) -> None:
    one, two = make(), make()
    one.admit("k", per_minute=1, concurrent=5)
    for _ in range(20):
        assert isinstance(two.admit("k", per_minute=1, concurrent=5), Refused)
    assert one.in_hand("k") == two.in_hand("k") == 1


def test_the_wait_for_concurrency_follows_how_fast_requests_end(
    make: Callable[[], Limits], clock: Clock
) -> None:
    limits = make()
    for _ in range(3):
        limits.admit("k", per_minute=None, concurrent=1)
        clock.wait(8)
        limits.leave("k")
        # Time in which nothing was asked says nothing.
        clock.wait(1000)
    limits.admit("k", per_minute=None, concurrent=1)
    for waited, expected in ((0, 8), (5, 3), (2, 2), (600, 2)):
        clock.wait(waited)
        assert limits.admit("k", per_minute=None, concurrent=1) == Refused(
            "concurrent", 1, expected, None, 0.0
        )


def test_leaving_what_did_not_come_is_told(make: Callable[[], Limits]) -> None:
    one, two = make(), make()
    one.admit("k", per_minute=None, concurrent=1)
    with pytest.raises(ValueError, match="in hand"):
        two.leave("k")
    one.leave("k")
    with pytest.raises(ValueError, match="in hand"):
        one.leave("k")
    assert one.in_hand("k") == 0


@pytest.mark.parametrize(("per_minute", "concurrent"), [(0, None), (-1, None), (None, 0), (5, -5)])
def test_a_limit_below_one_is_no_limit(
    make: Callable[[], Limits], per_minute: int | None, concurrent: int | None
) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make().admit("k", per_minute=per_minute, concurrent=concurrent)


def test_a_changed_limit_keeps_what_was_used(make: Callable[[], Limits]) -> None:
    limits = make()
    for _ in range(10):
        limits.admit("k", per_minute=10, concurrent=None)
    assert isinstance(limits.admit("k", per_minute=1, concurrent=None), Refused)
    assert limits.look("k", per_minute=600) == Admitted(600, 0, 60.0)


def test_a_worker_that_ends_has_nothing_in_hand(make: Callable[[], Limits], tmp_path: Path) -> None:
    one = make()
    other = Limits(tmp_path / "run" / "limits", rows=16, seats=4)
    other.admit("k", per_minute=None, concurrent=1)
    other.close()
    assert isinstance(one.admit("k", per_minute=None, concurrent=1), Admitted)


def test_more_busy_subjects_than_rows_are_refused_not_miscounted(
    make: Callable[[], Limits], clock: Clock
) -> None:
    limits = make()
    for number in range(16):
        limits.admit(f"k{number}", per_minute=60, concurrent=None)
    with pytest.raises(ApiError) as caught:
        limits.admit("one more", per_minute=60, concurrent=None)
    assert (caught.value.status, caught.value.code) == (503, "limits_full")
    assert limits.look("k3", per_minute=60).remaining == 59
    # To look is always possible.
    assert limits.look("one more", per_minute=60) == Admitted(60, 60, 0.0)
    assert limits.in_hand("one more") == 0
    # A second later their rates have nothing to remember, and the rows can be others'.
    clock.wait(1)
    for number in range(16):
        assert limits.admit(f"other{number}", per_minute=60, concurrent=None) == Admitted(60, 59, 1.0)


def test_the_dead_make_room_in_a_full_table(make: Callable[[], Limits], tmp_path: Path, clock: Clock) -> None:
    one = make()
    dead = Limits(tmp_path / "run" / "limits", clock=clock, rows=16, seats=4)
    for number in range(16):
        dead.admit(f"k{number}", per_minute=None, concurrent=1)
    with pytest.raises(ApiError):
        one.admit("one more", per_minute=None, concurrent=1)
    dead._counts.abandon()
    assert isinstance(one.admit("one more", per_minute=None, concurrent=1), Admitted)


@pytest.mark.parametrize("back", [MINUTE, 300 * MINUTE, 10**6 * MINUTE])
def test_time_that_went_back_locks_nobody_out(make: Callable[[], Limits], clock: Clock, back: int) -> None:
    clock.now = 2 * 10**6 * MINUTE
    limits = make()
    while isinstance(limits.admit("k", per_minute=5, concurrent=None), Admitted):
        pass
    clock.now -= back + 2 * SECOND
    assert limits.look("k", per_minute=5) == Admitted(5, 5, 0.0)
    assert isinstance(limits.admit("k", per_minute=5, concurrent=None), Admitted)


def test_a_table_that_was_taken_away_is_begun_anew_with_what_is_in_hand(
    make: Callable[[], Limits], clock: Clock, tmp_path: Path
) -> None:
    one, two = make(), make()
    one.admit("k", per_minute=None, concurrent=3)
    two.admit("k", per_minute=None, concurrent=3)
    (tmp_path / "run" / "limits").unlink()
    clock.wait(2)
    one.admit("k", per_minute=None, concurrent=3)
    assert isinstance(two.admit("k", per_minute=None, concurrent=3), Refused)
    assert one.in_hand("k") == two.in_hand("k") == 3
    for _ in range(2):
        one.leave("k")
    two.leave("k")
    assert one.in_hand("k") == 0


def test_a_full_table_is_begun_anew_with_all_that_is_in_hand(
    make: Callable[[], Limits], clock: Clock, tmp_path: Path
) -> None:
    limits = make()
    for number in range(16):
        for _ in range(1 + number % 3):
            limits.admit(f"k{number}", per_minute=None, concurrent=3)
    (tmp_path / "run" / "limits").unlink()
    clock.wait(2)
    limits.admit("k0", per_minute=None, concurrent=3)
    assert [limits.in_hand(f"k{number}") for number in range(16)] == [2, *(1 + n % 3 for n in range(1, 16))]
    for number in range(16):
        limits.leave(f"k{number}")
        assert limits.in_hand(f"k{number}") == (1 if number == 0 else number % 3)


def test_what_is_in_hand_is_known_however_many_others_come(make: Callable[[], Limits], clock: Clock) -> None:
    limits = make()
    limits.admit("k", per_minute=60, concurrent=2)
    for number in range(100):
        limits.admit(f"other{number}", per_minute=60, concurrent=None)
        clock.wait(1)
    assert len(limits._known) <= 32
    assert limits.admit("k", per_minute=60, concurrent=2) == Admitted(60, 59, 1.0)
    assert isinstance(limits.admit("k", per_minute=60, concurrent=2), Refused)
    for left in (1, 0):
        limits.leave("k")
        assert limits.in_hand("k") == left


def test_to_leave_waits_for_nobody(make: Callable[[], Limits]) -> None:
    one, two = make(), make()
    one.admit("k", per_minute=None, concurrent=1)
    two._counts.lock()
    leaving = threading.Thread(target=one.leave, args=("k",))
    leaving.start()
    leaving.join(5)
    still_waits = leaving.is_alive()
    two._counts.unlock()
    leaving.join()
    assert not still_waits
    assert isinstance(two.admit("k", per_minute=None, concurrent=1), Admitted)


class Model(RuleBasedStateMachine):
    """Several workers, killed and begun anew, against buckets of exact fractions."""

    rows, how_many = 4, 3
    rates = st.sampled_from([None, 1, 2, 7, 60, 999])
    at_once = st.sampled_from([None, 1, 2, 3])
    subjects = st.sampled_from([f"key_{number}" for number in range(7)])
    numbers = st.integers(0, 2)

    @initialize(data=st.data(), rates=st.lists(rates, min_size=7, max_size=7))
    def begin(self, data: st.DataObject, rates: list[int | None]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="hearth-limits-")
        self.clock = Clock()
        self.workers = [self.make() for _ in range(self.how_many)]
        self.rate = {f"key_{number}": rate for number, rate in enumerate(rates)}
        #: Tokens that are missing to a full bucket, and what each worker has in hand.
        self.missing: dict[str, Fraction] = {subject: Fraction(0) for subject in self.rate}
        self.in_hand: list[Counter[str]] = [Counter() for _ in self.workers]

    def make(self) -> Limits:
        return Limits(Path(self.folder.name) / "limits", clock=self.clock, rows=self.rows, seats=4)

    def interval(self, subject: str) -> int:
        return -(-MINUTE // (self.rate[subject] or 1))

    def is_busy(self, subject: str) -> bool:
        return self.missing[subject] > 0 or any(each[subject] for each in self.in_hand)

    @rule(number=numbers, subject=subjects, concurrent=at_once)
    def admit(self, number: int, subject: str, concurrent: int | None) -> None:
        number %= len(self.workers)
        rate = self.rate[subject]
        if rate is None and concurrent is None:
            return
        others = sum(self.is_busy(each) for each in self.rate if each != subject)
        if not self.is_busy(subject) and others >= self.rows:
            with pytest.raises(ApiError):
                self.workers[number].admit(subject, per_minute=rate, concurrent=concurrent)
            return
        told = self.workers[number].admit(subject, per_minute=rate, concurrent=concurrent)
        interval = self.interval(subject)
        missing = self.missing[subject]
        total = sum(each[subject] for each in self.in_hand)
        if rate is not None and missing > rate - 1:
            assert isinstance(told, Refused) and told.reason == "per_minute"
            wait_ns = (missing - (rate - 1)) * interval
            assert told.retry_after_ms == math.ceil(wait_ns / 10**6)
        elif concurrent is not None and total >= concurrent:
            assert isinstance(told, Refused) and told.reason == "concurrent"
            assert 0.1 <= told.retry_after_s <= 60
        else:
            assert isinstance(told, Admitted)
            if rate is not None:
                missing += 1
                self.missing[subject] = missing
            if concurrent is not None:
                self.in_hand[number][subject] += 1
        if rate is not None:
            assert told.remaining == math.floor(rate - missing)
            assert told.reset_s == pytest.approx(float(missing * interval) / SECOND, abs=1e-9)

    @rule(number=numbers, subject=subjects)
    def leave(self, number: int, subject: str) -> None:
        number %= len(self.workers)
        if self.in_hand[number][subject]:
            self.in_hand[number][subject] -= 1
            self.workers[number].leave(subject)

    @rule(
        nanoseconds=st.one_of(
            st.integers(0, 2 * SECOND), st.integers(0, 70 * SECOND), st.sampled_from([SECOND, 30 * SECOND])
        )
    )
    def wait(self, nanoseconds: int) -> None:
        self.clock.now += nanoseconds
        for subject, missing in self.missing.items():
            self.missing[subject] = max(Fraction(0), missing - Fraction(nanoseconds, self.interval(subject)))

    @rule(number=numbers, killed=st.booleans())
    def restart(self, number: int, killed: bool) -> None:
        number %= len(self.workers)
        if killed:
            self.workers[number]._counts.abandon()
        else:
            self.workers[number].close()
        self.in_hand[number].clear()
        self.workers[number] = self.make()

    @precondition(lambda self: hasattr(self, "workers"))
    @invariant()
    def counts(self) -> None:
        for subject in self.rate:
            total = sum(each[subject] for each in self.in_hand)
            assert self.workers[0].in_hand(subject) == total
            rate = self.rate[subject]
            if rate is not None:
                left = math.floor(rate - self.missing[subject])
                assert self.workers[-1].look(subject, per_minute=rate).remaining == left

    def teardown(self) -> None:
        if hasattr(self, "workers"):
            for worker in self.workers:
                worker.close()
            self.folder.cleanup()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Alone(Model):
    """One worker that is alone but for visitors, and notices a second later that they have gone."""

    how_many = 1

    @rule(
        subject=Model.subjects,
        concurrent=st.lists(Model.at_once, max_size=3),
        killed=st.booleans(),
        noticed=st.booleans(),
    )
    def visit(self, subject: str, concurrent: list[int | None], killed: bool, noticed: bool) -> None:
        self.workers.append(self.make())
        self.in_hand.append(Counter())
        for each in concurrent:
            self.admit(number=1, subject=subject, concurrent=each)
            self.admit(number=0, subject=subject, concurrent=each)
        visitor = self.workers.pop()
        self.in_hand.pop()
        if killed:
            visitor._counts.abandon()
        else:
            visitor.close()
        if noticed:
            self.wait(nanoseconds=SECOND)
        for each in concurrent:
            self.admit(number=0, subject=subject, concurrent=each)


TestAlone = Alone.TestCase
TestAlone.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
