"""A table that all gateway workers of a machine share in memory: a row a subject, with counts a worker.

One file, mapped by every worker. `lock` keeps others out of the table: an flock, or, while a worker is alone
with the table, a word in it that says so; a newcomer takes that away before it comes in. Each worker has a
*seat*: a column of counts that only it writes while it lives, and a byte of the file that it keeps locked, so
that the counts of a killed worker are known for dead at once, without a timeout.

The rows are an open hash table with a bounded search. A row is never emptied again, only taken over by
another subject once it says nothing (nothing in hand, no rate to remember), so that a search may end at the
first row that was never used. Every change is single writes of whole words in an order such that a worker
that is killed between two of them leaves a table that counts right. Linux only (open file description locks).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("hearth.limits")

#: The state of the file: magic, version, rows, seats, boot.
_HEAD = struct.Struct("<8sIII16s")
_MAGIC, _VERSION = b"HEARTHct", 2
#: The first page: the head, three words (how many seats were ever taken, how often the table was opened, and
#: the seat, plus one, that is in it without an flock), and the bytes that seats lock.
_PAGE, _TAKEN_AT, _SEAT_LOCKS_AT = 4096, 256, 1024
_MOST_SEATS = _PAGE - _SEAT_LOCKS_AT
#: Bytes of a row: its subject's digest and three times; and of a count.
_ROW, _COUNT = 16 + 3 * 8, 4
#: Rows that are looked at for a subject.
_SEARCH = 64
#: `struct flock` of 64-bit Linux.
_FLOCK = struct.Struct("@hhqqi4x")
#: A time further ahead than any rate remembers is nonsense (of a clock that was set back), nanoseconds.
FARTHEST_NS = 61 * 10**9
#: A newcomer's longest wait for the one who is in the table without an flock, and one look's pause, seconds.
_OUT_S, _OUT_PAUSE_S = 2.0, 0.001


class CountsError(Exception):
    """The table cannot be used; the message says why and what to do."""


class CountsFullError(CountsError):
    """No row is left for one more subject."""


class SharedCounts:
    """One worker's view of the table. For one thread.

    Unlocked only `lock` may be called, and a row used in which this worker has something in hand: such a row
    is given to nobody, and a count in its own column is the worker's alone.
    """

    def __init__(self, file: Path, *, rows: int = 32768, seats: int = 256) -> None:
        """Opens the table, makes it where it is missing or cannot be read, and takes a seat.

        Args:
            file: its folder is made (0700) where missing.
            rows: subjects that can be busy at once, a power of two; seats: workers, old and new ones.

        Raises:
            CountsError: the file cannot be made, or every seat is taken.
        """
        if rows & (rows - 1) or not 0 < seats <= _MOST_SEATS:
            raise ValueError(f"{rows} rows and {seats} seats: rows are a power of two, seats {_MOST_SEATS}.")
        self.file, self.rows, self.seats = file, rows, seats
        self._columns_at = _PAGE + rows * _ROW
        #: Whether nobody else was at the table when it had been opened `_opens` times.
        self._alone, self._opens = False, 0
        #: Whether this worker has the flock, which `_open` takes.
        self._flocked = True
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = self._open()
            try:
                self.seat = self._take_seat()
                self._map()
                self._clear(self.seat)
                self.words[0] = max(self.words[0], self.seat + 1)
                self._come_in()
                self.unlock()
            except BaseException:
                os.close(self._handle)
                raise
        except OSError as error:
            raise CountsError(
                f"the table of limits {file} cannot be used: {error.strerror}. Free some space there, make "
                "its folder writable for this user, or set XDG_RUNTIME_DIR to another."
            ) from error

    def close(self) -> None:
        """Gives the seat up, with what this worker counted."""
        self.lock()
        self._clear(self.seat)
        self.unlock()
        self.abandon()

    def abandon(self) -> None:
        """Lets go of everything as a killed process would: its counts stay, for others to find dead."""
        times = (self.tat, self.since, self.pace, self._times)
        for view in (*times, self.keys, self.mine, self._counts, self.words):
            view.release()
        self._memory.close()
        os.close(self._handle)

    def lock(self) -> bool:
        """Waits until no other worker is in the table; whether there is no other one at all."""
        if self._alone:
            words = self.words
            words[2] = self._mark
            if words[1] == self._opens:
                return True
            words[2] = 0
            self._alone = False
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        self._flocked = True
        return False

    def unlock(self) -> None:
        """After a `lock` that said True, `words[2] = 0` is the same."""
        if self._flocked:
            self._flocked = False
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        else:
            self.words[2] = 0

    def look_around(self) -> None:
        """Notices when the other workers have gone: to be called now and then, outside of the lock."""
        if self._alone:
            return
        self.lock()
        try:
            self._alone, self._opens = self._is_alone(), self.words[1]
        finally:
            self.unlock()

    def _come_in(self) -> None:
        """Ends the solitude of whoever was alone with the table, under the flock."""
        words = self.words
        words[1] = (words[1] + 1) % 2**32
        # Long enough for the word to be seen by a processor that was about to look at it.
        time.sleep(_OUT_PAUSE_S)
        until = time.monotonic() + _OUT_S
        while words[2] and time.monotonic() < until:
            there = words[2] - 1
            if there == self.seat or not _is_locked(self._handle, _SEAT_LOCKS_AT + there):
                # It died in there: single words were written in an order that counts right.
                words[2] = 0
                break
            time.sleep(_OUT_PAUSE_S)
        self._alone, self._opens = self._is_alone(), words[1]

    def _is_alone(self) -> bool:
        others = (seat for seat in range(self.words[0]) if seat != self.seat)
        return not any(_is_locked(self._handle, _SEAT_LOCKS_AT + seat) for seat in others)

    def is_current(self) -> bool:
        """Whether the file still bears its name: a cleaner of old files may have taken it away."""
        return _same_file(self._handle, self.file)

    def row(self, subject: str, now: int) -> int:
        """The subject's row, a new one where it has none; `now` in nanoseconds.

        Raises:
            CountsFullError: every row in reach is busy.
        """
        low, high = _digest(subject)
        found = self._find(low, high)
        if found is None:
            found = self._make(low, high, now)
        if found is None:
            for seat in range(self.words[0]):
                self._clear_if_dead(seat)
            found = self._make(low, high, now)
        if found is None:
            raise CountsFullError(f"the table of limits {self.file} has no row left for one more subject.")
        return found

    def known_row(self, subject: str) -> int | None:
        """The subject's row, where it has one."""
        return self._find(*_digest(subject))

    def total(self, row: int) -> int:
        """What all workers have in hand of the row's subject."""
        return sum(self._counts[row : row + self.words[0] * self.rows : self.rows])

    def add(self, row: int, number: int) -> None:
        """Adds to what this worker has in hand."""
        self.mine[row] += number

    def forget_dead(self, row: int) -> bool:
        """Clears what dead workers have in hand, of the row's subject and others; whether there was any."""
        found = False
        for seat in range(self.words[0]):
            if self._counts[seat * self.rows + row]:
                found |= self._clear_if_dead(seat)
        return found

    def _reach(self, high: int) -> Iterator[int]:
        return ((high + step) & (self.rows - 1) for step in range(min(_SEARCH, self.rows)))

    def _find(self, low: int, high: int) -> int | None:
        keys = self.keys
        for place in self._reach(high):
            there = keys[2 * place]
            if there == low and keys[2 * place + 1] == high:
                return place
            if there == 0:
                return None
        return None

    def _make(self, low: int, high: int, now: int) -> int | None:
        keys = self.keys
        for place in self._reach(high):
            if keys[2 * place] and not self._is_idle(place, now):
                continue
            self.tat[place] = self.since[place] = self.pace[place] = 0
            # The half that says "never used" comes last.
            keys[2 * place + 1] = high
            keys[2 * place] = low
            return place
        return None

    def _is_idle(self, row: int, now: int) -> bool:
        remembers = now < self.tat[row] <= now + FARTHEST_NS
        return not remembers and self.total(row) == 0

    def _clear_if_dead(self, seat: int) -> bool:
        if seat == self.seat or _is_locked(self._handle, _SEAT_LOCKS_AT + seat):
            return False
        self._clear(seat)
        return True

    def _clear(self, seat: int) -> None:
        start = self._columns_at + seat * self.rows * _COUNT
        self._memory[start : start + self.rows * _COUNT] = bytes(self.rows * _COUNT)

    def _take_seat(self) -> int:
        for seat in range(self.seats):
            if not _try_lock(self._handle, _SEAT_LOCKS_AT + seat):
                continue
            size = self.rows * _COUNT
            # Room on the disk beforehand: a mapped file that finds none kills its process.
            os.posix_fallocate(self._handle, self._columns_at + seat * size, size)
            return seat
        raise CountsError(f"all {self.seats} seats of the table of limits {self.file} are taken.")

    def _open(self) -> int:
        """The file, open, locked and whole."""
        while True:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if _same_file(handle, self.file):
                    if os.fstat(handle).st_size == 0:
                        self._begin(handle)
                    if self._is_whole(handle):
                        return handle
                    self._replace()
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _replace(self) -> None:
        """Begins a new file beside one that cannot be used: a worker may still live with that one."""
        log.warning("%s is damaged, of another version or from before a restart: begun anew.", self.file)
        fresh = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        handle = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._begin(handle)
            fresh.replace(self.file)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    def _head(self) -> bytes:
        return _HEAD.pack(_MAGIC, _VERSION, self.rows, self.seats, _boot())

    def _begin(self, handle: int) -> None:
        os.ftruncate(handle, self._columns_at + self.seats * self.rows * _COUNT)
        os.posix_fallocate(handle, 0, self._columns_at)
        os.pwrite(handle, self._head(), 0)

    def _is_whole(self, handle: int) -> bool:
        size = self._columns_at + self.seats * self.rows * _COUNT
        if os.fstat(handle).st_size != size or os.pread(handle, _HEAD.size, 0) != self._head():
            return False
        (taken,) = struct.unpack("@I", os.pread(handle, 4, _TAKEN_AT))
        return bool(taken <= self.seats)

    def _map(self) -> None:
        self._memory = mmap.mmap(self._handle, 0)
        with memoryview(self._memory) as whole:
            times_at = _PAGE + self.rows * 16
            self.words = whole[_TAKEN_AT : _TAKEN_AT + 12].cast("I")
            #: Two of each row: the digest of its subject.
            self.keys = whole[_PAGE:times_at].cast("Q")
            self._times = whole[times_at : self._columns_at].cast("q")
            self._counts = whole[self._columns_at :].cast("I")
        #: Of each row, in nanoseconds of CLOCK_MONOTONIC: when its rate has nothing to remember any more (the
        #: theoretical arrival time), when a request last came to it or left, and how long it is from one
        #: leaving to the next.
        self.tat = self._times[: self.rows]
        self.since = self._times[self.rows : 2 * self.rows]
        self.pace = self._times[2 * self.rows :]
        #: What this worker has in hand of each row's subject, and its sign in the word of who is in there.
        self.mine = self._counts[self.seat * self.rows : (self.seat + 1) * self.rows]
        self._mark = self.seat + 1


def _digest(subject: str) -> tuple[int, int]:
    low, high = struct.unpack("<QQ", hashlib.blake2b(subject.encode(), digest_size=16).digest())
    # Zero means a row that was never used.
    return low | 1, high


def _boot() -> bytes:
    """What tells one run of the system from the next: CLOCK_MONOTONIC begins anew with each."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return bytes.fromhex(text.replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def _try_lock(handle: int, byte: int) -> bool:
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True


def _is_locked(handle: int, byte: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind = _FLOCK.unpack(fcntl.fcntl(handle, fcntl.F_OFD_GETLK, asked))[0]
    return bool(kind != fcntl.F_UNLCK)


def _same_file(handle: int, file: Path) -> bool:
    try:
        there = file.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
