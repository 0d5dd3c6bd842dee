"""The local journal: where a worker's rows are safe while the database is away.

One file a worker, held under an exclusive lock while the worker lives: who can take the lock knows that the
worker is dead. A record is a mark, its length, its CRC-32 and its bytes; a batch is one write and one fsync.
A record cut short by a crash was never acknowledged to anybody, since that happens after the fsync.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

log = logging.getLogger("hearth.journal")

_MARK = b"\xf1HJ\x01"
_HEAD = struct.Struct("<4sII")
#: What a record takes beside its bytes.
HEAD_BYTES = _HEAD.size
SUFFIX = ".journal"


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
    """The records in a file's bytes, and the ranges (start, end) that are none.

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
        damage.append((place, after))
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

    Its methods block for as long as the disk takes: call them from a thread.
    """

    def __init__(self, file: Path, *, most_bytes: int) -> None:
        """Opens the file, makes it where missing, and cuts off what a crash left unfinished at its end.

        Raises:
            JournalHeldError: a living process has it.
            JournalError: it cannot be made or opened.
        """
        self.file = file
        self.most_bytes = most_bytes
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(
                f"the journal {file} cannot be opened: {error.strerror}. Free the disk or mend its rights."
            ) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who folded a dead worker's journal removes it: what we locked may be gone by now.
            if not _same_file(self._handle, file):
                raise JournalHeldError(f"the journal {file} was taken away while it was opened. Try again.")
            _sync_folder(file.parent)
            self._size = self._mend()
        except BlockingIOError as error:
            os.close(self._handle)
            raise JournalHeldError(f"the journal {file} is held by a living process.") from error
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes that whole records take."""
        return self._size

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
        try:
            _write_all(self._handle, data)
            os.fdatasync(self._handle)
        except OSError as error:
            self._cut(self._size)
            kind = JournalFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else JournalError
            raise kind(f"the journal {self.file} cannot be written: {error.strerror}.") from error
        self._size += len(data)

    def records(self) -> list[bytes]:
        """All whole records, in the order in which they were added."""
        return unpack(self._read())[0]

    def clear(self) -> None:
        """Forgets the records: they are in the database.

        Raises:
            JournalError: the disk refused. The records are still there; folding them in again is harmless.
        """
        try:
            os.ftruncate(self._handle, 0)
            os.fdatasync(self._handle)
        except OSError as error:
            raise JournalError(f"the journal {self.file} cannot be emptied: {error.strerror}.") from error
        self._size = 0

    def close(self) -> None:
        """Lets go of the file and its lock; more than once is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def remove(self) -> None:
        """Deletes the file while still holding it, then lets go."""
        self.file.unlink(missing_ok=True)
        self.close()

    def _read(self) -> bytes:
        parts: list[bytes] = []
        place = 0
        while part := os.pread(self._handle, 1 << 20, place):
            parts.append(part)
            place += len(part)
        return b"".join(parts)

    def _mend(self) -> int:
        """Removes an unfinished end; of other damage a copy is kept for a person to look at."""
        data = self._read()
        records, damage = unpack(data)
        if not damage:
            return len(data)
        if len(damage) > 1 or damage[0][1] < len(data):
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
        start, end = damage[-1]
        if end < len(data):
            return len(data)
        self._cut(start)
        return start

    def _cut(self, size: int) -> None:
        """Back to a length at which the records are whole. The next opening does the same if this fails."""
        try:
            os.ftruncate(self._handle, size)
            os.fdatasync(self._handle)
        except OSError as error:
            log.error("%s cannot be cut back to its whole records: %s.", self.file, error.strerror)


def left_behind(folder: Path, *, most_bytes: int) -> Iterator[Journal]:
    """The journals of dead workers in a folder, each open and locked; the caller removes or closes them."""
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            yield Journal(file, most_bytes=most_bytes)
        except JournalHeldError:
            continue


def read_only(file: Path) -> tuple[list[bytes], int]:
    """The records of a journal and its damaged bytes, without a lock and without mending it.

    Of a journal that is being written, the last record may count as damaged: it is not finished yet.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return [], 0
    records, damage = unpack(data)
    return records, sum(end - start for start, end in damage)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


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
