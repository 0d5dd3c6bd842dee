"""Requests per minute and requests at once, exact over all gateway workers of one machine.

The rate is the generic cell rate algorithm (ITU-T Recommendation I.371, annex A, as virtual scheduling): one
number a subject, the theoretical arrival time, says how much of its rate is used up. Here the bucket holds a
whole minute's requests, so that a limit of N admits N at once and then one every 60/N seconds. All is integer
nanoseconds of CLOCK_MONOTONIC, which the processes of a machine share and nobody can set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from engine.errors import ApiError
from engine.metering.shared_counts import FARTHEST_NS, CountsError, CountsFullError, SharedCounts

log = logging.getLogger("hearth.limits")

_MINUTE_NS, _SECOND_NS, _MS_NS = 60 * 10**9, 10**9, 10**6
#: A higher rate (17 million requests a second) is one that no machine reaches; it counts as this one.
_MOST_PER_MINUTE = 10**9
#: Told to wait where nothing is known yet, and the shortest and longest wait told for requests at once.
_UNKNOWN_NS, _LEAST_NS, _MOST_NS = _SECOND_NS, 100 * _MS_NS, _MINUTE_NS
#: How often it is looked whether the table's file is still there.
_LOOK_NS = _SECOND_NS


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """The request may go on.

    limit: requests per minute; remaining: how many more would be admitted at this moment; None for both where
    there is no such limit. reset_s: seconds until `remaining` is `limit` again.
    """

    limit: int | None
    remaining: int | None
    reset_s: float


class Refused(msgspec.Struct, frozen=True, gc=False):
    """The request must be answered 429; nothing was counted.

    limit: the one that refuses. retry_after_s: a whole number of milliseconds; for 'per_minute' exact: after
    it the next request is admitted if nobody else asks; for 'concurrent' an estimate from how fast this
    subject's requests have ended. remaining, reset_s: of the rate, as in `Admitted`.
    """

    reason: Literal["per_minute", "concurrent"]
    limit: int
    retry_after_s: float
    remaining: int | None
    reset_s: float

    @property
    def retry_after_ms(self) -> int:
        return round(self.retry_after_s * 1000)


_UNLIMITED = Admitted(None, None, 0.0)


class Limits:
    """One worker's limits, shared with the other workers of its machine; for one thread."""

    def __init__(
        self,
        file: Path,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        rows: int = 32768,
        seats: int = 256,
    ) -> None:
        """`file`: `<config.runtime_dir>/limits`, the same for all workers; `clock` in nanoseconds.

        Raises:
            CountsError: the table cannot be made or opened.
        """
        self._file, self._clock, self._rows, self._seats = file, clock, rows, seats
        self._counts = self._open()
        #: What this worker has in hand, so that it can be counted again in a new table.
        self._mine: dict[str, int] = {}
        self._look_at = clock() + _LOOK_NS

    def close(self) -> None:
        """Ends this worker's part; what it has in hand is in nobody's hand any more."""
        self._counts.close()

    def admit(self, subject: str, *, per_minute: int | None, concurrent: int | None) -> Admitted | Refused:
        """Counts a request of `subject` in, or refuses it and changes nothing.

        Where `concurrent` is given and the request admitted, `leave` follows once, when it has ended.

        Raises:
            ApiError: 503 `limits_full`: more subjects are busy at once than can be counted.
        """
        if per_minute is None and concurrent is None:
            return _UNLIMITED
        if (per_minute is not None and per_minute < 1) or (concurrent is not None and concurrent < 1):
            raise ValueError(f"limits are at least 1: {per_minute} a minute, {concurrent} at once.")
        self._look()
        counts = self._counts
        counts.lock()
        try:
            # Read under the lock, so that times grow from one worker to the next.
            now = self._clock()
            row = counts.row(subject, now)
            rate = _Rate(per_minute, counts.tat[row], now) if per_minute is not None else None
            if rate is not None and rate.wait_ns > 0:
                wait_s = _up_to_ms(rate.wait_ns)
                return Refused("per_minute", rate.limit, wait_s, rate.remaining, rate.reset_s)
            if concurrent is not None:
                in_hand = counts.total(row)
                if in_hand >= concurrent and counts.forget_dead(row):
                    in_hand = counts.total(row)
                if in_hand >= concurrent:
                    wait_s = _up_to_ms(_until_leave(counts, row, now))
                    told = (rate.remaining, rate.reset_s) if rate is not None else (None, 0.0)
                    return Refused("concurrent", concurrent, wait_s, *told)
                if in_hand == 0:
                    counts.since[row] = now
                counts.add(row, 1)
                self._mine[subject] = self._mine.get(subject, 0) + 1
            if rate is None:
                return _UNLIMITED
            rate.take()
            counts.tat[row] = rate.tat
            return Admitted(rate.limit, rate.remaining, rate.reset_s)
        except CountsFullError as error:
            log.error("%s A request was refused.", error)
            raise _full() from error
        finally:
            counts.unlock()

    def leave(self, subject: str) -> None:
        """A request that was admitted with `concurrent` has ended.

        Raises:
            ValueError: this worker has none of that subject in hand.
        """
        mine = self._mine.get(subject, 0)
        if mine < 1:
            raise ValueError(f"no request of {subject} is in hand here.")
        if mine == 1:
            del self._mine[subject]
        else:
            self._mine[subject] = mine - 1
        counts = self._counts
        counts.lock()
        try:
            now = self._clock()
            # It has one: a row with something in hand is not given to another subject.
            row = counts.row(subject, now)
            counts.add(row, -1)
            between = max(0, now - counts.since[row])
            known = counts.pace[row]
            counts.pace[row] = between if known <= 0 else known + (between - known) // 8
            counts.since[row] = now
        finally:
            counts.unlock()

    def look(self, subject: str, *, per_minute: int | None) -> Admitted:
        """What is left of the rate now, for the headers of answers to what was not admitted."""
        if per_minute is None:
            return _UNLIMITED
        counts = self._counts
        counts.lock()
        try:
            row = counts.known_row(subject)
            rate = _Rate(per_minute, 0 if row is None else counts.tat[row], self._clock())
            return Admitted(rate.limit, rate.remaining, rate.reset_s)
        finally:
            counts.unlock()

    def in_hand(self, subject: str) -> int:
        """How many requests of a subject the living workers have in hand."""
        counts = self._counts
        counts.lock()
        try:
            row = counts.known_row(subject)
            if row is None:
                return 0
            counts.forget_dead(row)
            return counts.total(row)
        finally:
            counts.unlock()

    def _open(self) -> SharedCounts:
        return SharedCounts(self._file, rows=self._rows, seats=self._seats)

    def _look(self) -> None:
        """Moves to a new table when the file was taken away (by a cleaner of old files, say)."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_NS
        if self._counts.is_current():
            self._counts.look_around()
            return
        try:
            fresh = self._open()
        except CountsError as error:
            log.error("The table of limits was taken away, and no new one can be made: %s", error)
            return
        log.warning("The table of limits %s was taken away: begun anew.", self._file)
        fresh.lock()
        try:
            for subject, number in self._mine.items():
                fresh.add(fresh.row(subject, now), number)
        finally:
            fresh.unlock()
        self._counts.close()
        self._counts = fresh


class _Rate:
    """The rate of one subject at one moment."""

    __slots__ = ("_interval", "_now", "_window", "limit", "tat", "wait_ns")

    def __init__(self, limit: int, tat: int, now: int) -> None:
        counted = min(limit, _MOST_PER_MINUTE)
        # Rounded up: the rate is never higher than the limit, and lower by less than N/6e10 of it.
        self._interval = -(-_MINUTE_NS // counted)
        self._window = self._interval * counted
        self._now = now
        self.limit = limit
        self.tat = tat if now < tat <= now + FARTHEST_NS else now
        #: Nanoseconds until one more is admitted; not above zero: now.
        self.wait_ns = self.tat + self._interval - self._window - now

    def take(self) -> None:
        self.tat += self._interval

    @property
    def remaining(self) -> int:
        used = -(-(self.tat - self._now) // self._interval)
        return max(0, self.limit - used)

    @property
    def reset_s(self) -> float:
        return (self.tat - self._now) / _SECOND_NS


def _until_leave(counts: SharedCounts, row: int, now: int) -> int:
    """About when one of the subject's requests ends, nanoseconds from now."""
    pace = counts.pace[row]
    if pace <= 0:
        return _UNKNOWN_NS
    # One that takes longer than they usually do will not end at once, either.
    return min(_MOST_NS, max(_LEAST_NS, pace - (now - counts.since[row]), pace // 4))


def _up_to_ms(nanoseconds: int) -> float:
    """Seconds, rounded up to a whole millisecond."""
    return -(-nanoseconds // _MS_NS) / 1000


def _full() -> ApiError:
    return ApiError(
        503,
        "More callers are busy at once than this server can count. Try again in a second.",
        code="limits_full",
        headers={"retry-after": "1", "retry-after-ms": "1000"},
    )
