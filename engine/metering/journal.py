"""The local journal: where a worker's rows are durable before their requests are answered.

One file a worker, held under an exclusive lock while the worker lives: who can take the lock knows that the
worker is dead. A record is a mark, its length, its CRC-32 and its bytes; a batch is one synchronous write. A
record cut short by a crash was never acknowledged to anybody, since that happens after the write.

The file is zeroed ahead of its records, since a write within a file that does not grow costs the disk less;
zeroes are no damage. Records that are in the database are dropped: those behind them are copied to the file's
begin, made durable, and only then zeroed where they were. A reader without the lock sees by the header's
counter whether that went on under its eyes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Self

log = logging.getLogger("hearth.journal")

_MARK = b"\xf1HJ\x01"
_HEAD = struct.Struct("<4sII")
#: What a record takes beside its bytes.
HEAD_BYTES = _HEAD.size
SUFFIX = ".journal"
#: A file begins with this mark and a counter that is odd while records are moved.
_HEADER = struct.Struct("<8sQ")
_FILE_MARK = b"HEARTHJ2"
#: Bytes that are zeroed ahead: of a new file, and at each growth.
_AHEAD_NEW, _AHEAD = 256 * 1024, 1024 * 1024
#: More bytes than these are not copied to the begin: they stay until most of them are dropped.
_MOST_COPIED = 1024 * 1024
#: Tries to read a journal while nothing in it is moved.
_READS = 500


class JournalError(Exception):
    """The journal cannot be written or read; the message says why and what to do."""


class JournalFullError(JournalError):
    """No room for one more row: a new request must be refused rather than be served uncounted."""


class JournalHeldError(JournalError):
    """Another living process holds this journal."""


def pack(records: Sequence[bytes]) -> bytes:
    """Records as they stand in the file."""
    return b"".join(_HEAD.pack(_MARK, len(data), zlib.crc32(data)) + data for data in records)


def unpack(data: bytes) -> tuple[list[bytes], list[tuple[int, int]]]:
    """The records in a file's bytes, and the ranges (start, end) that are neither records nor zeroes.

    After damage the next whole record is looked for, so that one bad sector does not hide what follows it.
    """
    records: list[bytes] = []
    damage: list[tuple[int, int]] = []
    place = 0
    while place < len(data):
        record = _record_at(data, place)
        if record is not None:
            records.append(record)
            place += HEAD_BYTES + len(record)
            continue
        after = _next_record(data, place + 1)
        if data.count(0, place, after) < after - place:
            damage.append((place, after if after < len(data) else len(data.rstrip(b"\0"))))
        place = after
    return records, damage


def _record_at(data: bytes, place: int) -> bytes | None:
    if len(data) - place < HEAD_BYTES:
        return None
    mark, length, check = _HEAD.unpack_from(data, place)
    body = data[place + HEAD_BYTES : place + HEAD_BYTES + length]
    whole = mark == _MARK and len(body) == length and zlib.crc32(body) == check
    return body if whole else None


def _next_record(data: bytes, start: int) -> int:
    """Where the next whole record begins, or the end of the bytes."""
    place = data.find(_MARK, start)
    while place >= 0:
        if _record_at(data, place) is not None:
            return place
        place = data.find(_MARK, place + 1)
    return len(data)


class Journal:
    """One worker's journal file, open and locked.

    Its methods block for as long as the disk takes: one thread calls them.
    """

    def __init__(self, file: Path, *, most_bytes: int) -> None:
        """Opens the file, makes it where missing, and cuts off what a crash left unfinished at its end.

        Raises:
            JournalHeldError: a living process has it.
            JournalError: it cannot be made or opened.
        """
        self.file = file
        self.most_bytes = most_bytes
        #: The position, counted from the first record ever added, of the first that is still in the file.
        self._start = 0
        self._moves = 0
        #: Bytes of the file, zeroed ahead or written.
        self._reach = 0
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(
                f"the journal {file} cannot be opened: {error.strerror}. Free the disk or mend its rights."
            ) from error
        self._synced = -1
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who folded a dead worker's journal removes it: what we locked may be gone by now.
            if not _same_file(self._handle, file):
                raise JournalHeldError(f"the journal {file} was taken away while it was opened. Try again.")
            # A write through this one returns once its bytes are on the disk.
            self._synced = os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_DSYNC)
            self._size = self._mend()
        except BlockingIOError as error:
            self.close()
            raise JournalHeldError(f"the journal {file} is held by a living process.") from error
        except OSError as error:
            self.close()
            raise JournalError(f"the journal {file} cannot be used: {error.strerror}.") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker(self) -> str:
        """The life that it is of, by its file's name."""
        return self.file.name.removesuffix(SUFFIX)

    @property
    def size(self) -> int:
        """Bytes that whole records take, and dropped ones whose place is not free yet."""
        return self._size

    @property
    def end(self) -> int:
        """The position behind the last record, for `drop`: it only ever grows."""
        return self._start + self._size

    def append(self, records: Sequence[bytes]) -> None:
        """Adds records; they are on the disk when this returns, or none of them counts.

        Raises:
            JournalFullError: they do not fit, or the disk is full; nothing was added.
            JournalError: the disk refused; nothing was added.
        """
        data = pack(records)
        if self._size + len(data) > self.most_bytes:
            raise JournalFullError(
                f"the journal {self.file} is full ({self._size} of {self.most_bytes} bytes): the database "
                "has been away for long. Bring it back; nothing is lost meanwhile."
            )
        place = _HEADER.size + self._size
        ahead = 0
        if place + len(data) > self._reach:
            ahead = min(_AHEAD, max(0, self.most_bytes - self._size - len(data)))
        try:
            _write_at(self._synced, data + bytes(ahead), place)
        except OSError as error:
            self._cut(place)
            kind = JournalFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else JournalError
            raise kind(f"the journal {self.file} cannot be written: {error.strerror}.") from error
        self._size += len(data)
        self._reach = max(self._reach, place + len(data) + ahead)

    def drop(self, position: int) -> None:
        """Forgets the records before a position (an `end` of before): they are in the database.

        Raises:
            JournalError: the disk refused. The records are still there; folding them in again is harmless.
        """
        gone = position - self._start
        live = self._size - gone
        if gone <= 0 or live > min(gone, _MOST_COPIED):
            # The copy would overlap what it copies, or be long: more is dropped soon.
            return
        begin, old = _HEADER.size, _HEADER.size + gone
        try:
            self._mark_move()
            # What is copied and the zeroes behind it, over all that was dropped: in one write, so that a
            # kill leaves no half of a record. After an outage the rest is cut off rather than zeroed.
            kept = min(gone, live + _AHEAD)
            data = os.pread(self._handle, live, old).ljust(kept, b"\0")
            _write_at(self._synced if live else self._handle, data, begin)
            if gone > _AHEAD:
                os.ftruncate(self._handle, begin + kept)
                self._reach = begin + kept
            else:
                _write_at(self._handle, bytes(live), old)
            self._mark_move()
        except OSError as error:
            raise JournalError(f"the journal {self.file} cannot be emptied: {error.strerror}.") from error
        self._start, self._size = position, live

    def records(self) -> list[bytes]:
        """All whole records, in the order in which they were added."""
        return unpack(self._read()[_HEADER.size :])[0]

    def close(self) -> None:
        """Lets go of the file and its lock; more than once is harmless."""
        for handle in (self._synced, self._handle):
            if handle >= 0:
                os.close(handle)
        self._synced = self._handle = -1

    def remove(self) -> None:
        """Deletes the file while still holding it, then lets go."""
        self.file.unlink(missing_ok=True)
        self.close()

    def _mark_move(self) -> None:
        self._moves += 1
        _write_at(self._handle, _HEADER.pack(_FILE_MARK, self._moves), 0)

    def _read(self) -> bytes:
        parts: list[bytes] = []
        place = 0
        while part := os.pread(self._handle, 1 << 20, place):
            parts.append(part)
            place += len(part)
        return b"".join(parts)

    def _mend(self) -> int:
        """Bytes of records; cuts off an unfinished end, and keeps a copy of other damage for a person."""
        data = self._read()
        self._reach = len(data)
        if len(data) < _HEADER.size:
            self._reach = _HEADER.size + min(_AHEAD_NEW, self.most_bytes)
            _write_at(self._synced, _HEADER.pack(_FILE_MARK, 0).ljust(self._reach, b"\0"), 0)
            _sync_folder(self.file.parent)
            return 0
        mark, self._moves = _HEADER.unpack_from(data)
        if mark != _FILE_MARK:
            raise JournalError(
                f"{self.file} is no journal of this Hearth: move it away, and keep it until its requests are "
                "accounted for."
            )
        if self._moves % 2:
            self._mark_move()
        body = data[_HEADER.size :]
        records, damage = unpack(body)
        size = _end(body)
        if any(start < size for start, _ in damage):
            # Left in place, where reading steps over it: rewriting the file could lose the whole records.
            aside = self.file.with_suffix(f".damaged-{zlib.crc32(data):08x}")
            aside.write_bytes(data)
            log.error(
                "%s has damaged bytes before whole records; its %d whole records are used, and %s keeps the "
                "file as it was.",
                self.file,
                len(records),
                aside,
            )
        if damage and damage[-1][0] >= size:
            self._cut(_HEADER.size + size)
        return size

    def _cut(self, place: int) -> None:
        """Cuts off all from a place on. The next opening does the same if this fails."""
        try:
            os.ftruncate(self._handle, place)
            os.fdatasync(self._handle)
            self._reach = place
        except OSError as error:
            log.error("%s cannot be cut back to its whole records: %s.", self.file, error.strerror)


def left_behind(folder: Path, *, most_bytes: int, but: Collection[str] = ()) -> Iterator[Journal]:
    """The journals of dead workers in a folder, each open and locked; the caller removes or closes them.

    Those of the workers `but`, and files that cannot be opened, are left out.
    """
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        if file.name.removesuffix(SUFFIX) in but:
            continue
        try:
            yield Journal(file, most_bytes=most_bytes)
        except JournalHeldError:
            continue
        except JournalError as error:
            log.error("%s", error)


def read_only(file: Path) -> tuple[list[bytes], int]:
    """The records of a journal and its damaged bytes, without a lock and without mending it.

    Of a journal that is being written, the last record may count as damaged: it is not finished yet.

    Raises:
        OSError: it cannot be read.
    """
    before = None
    for _ in range(_READS):
        try:
            data = file.read_bytes()
            with file.open("rb") as again:
                after = again.read(_HEADER.size)
        except FileNotFoundError:
            return [], 0
        moved = after != data[: _HEADER.size] or (len(after) == _HEADER.size and _HEADER.unpack(after)[1] % 2)
        # Odd all the time: its worker was killed while it moved records, and nothing changes any more.
        if not moved or (before == data):
            break
        before = data
        time.sleep(0.002)
    records, damage = unpack(data[_HEADER.size :])
    return records, sum(end - start for start, end in damage)


def _end(body: bytes) -> int:
    """Where the last whole record ends."""
    place = end = 0
    while place < len(body):
        record = _record_at(body, place)
        if record is None:
            place = _next_record(body, place + 1)
        else:
            place = end = place + HEAD_BYTES + len(record)
    return end


def _write_at(handle: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, place)
        view, place = view[written:], place + written


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _same_file(handle: int, file: Path) -> bool:
    try:
        there = file.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
