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
        #: Those with something in hand always, so that it can be counted again in a new table.
        self._known: dict[str, _Subject] = {}
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
        known = self._known.get(subject)
        if known is None or known.per_minute != per_minute or known.concurrent != concurrent:
            if per_minute is None and concurrent is None:
                return _UNLIMITED
            known = self._know(subject, per_minute, concurrent)
        now = self._clock()
        if now >= self._look_at:
            self._look()
            now = self._clock()
        counts = self._counts
        alone = counts.lock()
        try:
            if not alone:
                # Again, under the lock, so that times grow from one worker to the next.
                now = self._clock()
            row = known.row
            mine = known.mine
            if not mine:
                # Only a row with something in hand is sure to be its subject's still.
                keys = counts.keys
                if keys[2 * row] != known.low or keys[2 * row + 1] != known.high:
                    row = counts.row(subject, now)
                    known.keep(row, counts)
            if per_minute is None:
                used = 0
            else:
                used = counts.tat[row] - now
                if used < 0:
                    used = 0
                elif used > known.spare:
                    if used <= FARTHEST_NS:
                        wait_s, told = _up_to_ms(used - known.spare), _told(per_minute, used)
                        return Refused("per_minute", per_minute, wait_s, told.remaining, told.reset_s)
                    used = 0
            if concurrent is not None:
                # Where there is no other worker, what others have in hand is of the dead.
                in_hand = mine if alone else counts.total(row)
                if in_hand >= concurrent:
                    if not alone and counts.forget_dead(row):
                        in_hand = counts.total(row)
                    if in_hand >= concurrent:
                        wait_s = _up_to_ms(_until_leave(counts, row, now))
                        told = _told(per_minute, used)
                        return Refused("concurrent", concurrent, wait_s, told.remaining, told.reset_s)
                if not in_hand:
                    counts.since[row] = now
                mine += 1
                counts.mine[row] = mine
                known.mine = mine
            if per_minute is None:
                return _UNLIMITED
            used += known.interval
            counts.tat[row] = now + used
            # As `_told` says it, and never below zero here.
            return Admitted(per_minute, per_minute + -used // known.interval, used / _SECOND_NS)
        except CountsFullError as error:
            log.error("%s A request was refused.", error)
            raise _full() from error
        finally:
            if alone:
                # What `unlock` does, without the call.
                counts.words[2] = 0
            else:
                counts.unlock()

    def leave(self, subject: str) -> None:
        """A request that was admitted with `concurrent` has ended.

        Raises:
            ValueError: this worker has none of that subject in hand.
        """
        known = self._known.get(subject)
        if known is None or not known.mine:
            raise ValueError(f"no request of {subject} is in hand here.")
        # No lock: the row is its subject's while something is in hand, and the count is this worker's alone.
        # Of two workers that note how fast requests end at the same moment, one is lost: it is an estimate.
        now = self._clock()
        row = known.row
        counts = self._counts
        between = now - counts.since[row]
        if between < 0:
            between = 0
        usual = counts.pace[row]
        counts.pace[row] = between if usual <= 0 else usual + (between - usual) // 8
        counts.since[row] = now
        # Last: from here on the row can be another subject's.
        mine = known.mine - 1
        counts.mine[row] = mine
        known.mine = mine

    def look(self, subject: str, *, per_minute: int | None) -> Admitted:
        """What is left of the rate now, for the headers of answers to what was not admitted."""
        if per_minute is None:
            return _UNLIMITED
        counts = self._counts
        counts.lock()
        try:
            row = counts.known_row(subject)
            used = 0 if row is None else counts.tat[row] - self._clock()
            return _told(per_minute, used if 0 < used <= FARTHEST_NS else 0)
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

    def _know(self, subject: str, per_minute: int | None, concurrent: int | None) -> _Subject:
        """Keeps what a subject's limits say, where it is new or they have changed."""
        if (per_minute is not None and per_minute < 1) or (concurrent is not None and concurrent < 1):
            raise ValueError(f"limits are at least 1: {per_minute} a minute, {concurrent} at once.")
        known = self._known.get(subject)
        if known is None:
            if len(self._known) >= 2 * self._rows:
                # At most one a row has something in hand.
                self._known = {name: each for name, each in self._known.items() if each.mine}
            known = self._known[subject] = _Subject(subject)
        known.per_minute, known.concurrent = per_minute, concurrent
        if per_minute is not None:
            known.interval = _interval(per_minute)
            known.spare = known.interval * (min(per_minute, _MOST_PER_MINUTE) - 1)
        return known

    def _open(self) -> SharedCounts:
        return SharedCounts(self._file, rows=self._rows, seats=self._seats)

    def _look(self) -> None:
        """Moves to a new table when the file was taken away (by a cleaner of old files, say)."""
        now = self._clock()
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
        in_hand = [known for known in self._known.values() if known.mine]
        fresh.lock()
        try:
            rows = []
            for known in in_hand:
                rows.append(fresh.row(known.subject, now))
                fresh.add(rows[-1], known.mine)
            for known, row in zip(in_hand, rows, strict=True):
                known.keep(row, fresh)
        finally:
            fresh.unlock()
        self._counts.close()
        self._counts = fresh


class _Subject:
    """What this worker knows of one subject: its row in the table, what it has in hand and its limits."""

    __slots__ = ("concurrent", "high", "interval", "low", "mine", "per_minute", "row", "spare", "subject")

    def __init__(self, subject: str) -> None:
        self.subject = subject
        #: No row has this digest.
        self.row, self.low, self.high = 0, -1, -1
        self.mine = 0
        self.per_minute: int | None = None
        self.concurrent: int | None = None
        #: Of the rate, in nanoseconds: what one request uses up, and how much may be used for one more.
        self.interval, self.spare = 0, 0

    def keep(self, row: int, counts: SharedCounts) -> None:
        """Its row is this one, as long as it bears the subject's digest."""
        self.row, self.low, self.high = row, counts.keys[2 * row], counts.keys[2 * row + 1]


def _interval(per_minute: int) -> int:
    """What one request uses up of a minute, nanoseconds."""
    # Rounded up: the rate is never higher than the limit, and lower by less than N/6e10 of it.
    return -(-_MINUTE_NS // min(per_minute, _MOST_PER_MINUTE))


def _told(per_minute: int | None, used: int) -> Admitted:
    """What is left of a rate of which so many nanoseconds are used up."""
    if per_minute is None:
        return _UNLIMITED
    left = per_minute - -(-used // _interval(per_minute))
    return Admitted(per_minute, left if left > 0 else 0, used / _SECOND_NS)


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
