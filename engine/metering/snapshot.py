"""What a gateway knew of keys, tenants and plans, kept for a worker that starts without the database.

Digests alone are written, never keys. The file is a head of one line and the rows after it; the head has the
rows' SHA-256, so that a damaged file is told from a whole one. Workers of one machine write the same file: of
two readings of the database the later one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.metering.keys import Key
from engine.metering.plans import Plan
from engine.metering.tenants import Tenant

log = logging.getLogger("hearth.keys")

#: Of this layout and of the rows' own; a snapshot of another is not used.
FORMAT = 1
#: Readings closer than this are told apart by the database's count of changes: their workers may have been
#: held up between the reading and its writing. Also how far clocks may differ, milliseconds.
_CLOSE_MS = 10_000
#: Modes that let others write a file.
_OTHERS_WRITE = 0o022


#: Time between two marks that nothing has changed, and between two tries to write one, seconds.
_MARK_S = 60.0


class SnapshotError(Exception):
    """The file is of no use; the message names it and the reason."""


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    database: str
    version: int
    read_at: int
    plans: int
    tenants: int
    keys: int
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """One state of the database's keys, tenants and plans."""

    #: Digest of the database's name (its password is no part of it).
    database: str
    #: The count of changes (`changes.ACCESS`) that it holds.
    version: int
    #: When it was read or last found unchanged, unix milliseconds.
    read_at: int
    plans: tuple[Plan, ...]
    tenants: tuple[Tenant, ...]
    keys: tuple[Key, ...]


def database_digest(name: str) -> str:
    """Stands for a database: its name may hold what should not lie about."""
    return hashlib.sha256(name.encode()).hexdigest()


def write_snapshot(file: Path, snapshot: Snapshot, *, now_ms: int) -> bool:
    """Replaces the file as a whole, unless it holds a later reading; whether it did.

    Takes some milliseconds a thousand keys: a thread's work.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    content = _dump(snapshot)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.parent):
        if not _supersedes(snapshot, _head_of(file), now_ms):
            return False
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return True


def read_snapshot(file: Path, database: str) -> Snapshot | None:
    """The snapshot of this database; None where there is none.

    Raises:
        SnapshotError: it is damaged, of another database or format, or others may write it.
    """
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            content = opened.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotError(f"{file} cannot be read: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        raise SnapshotError(f"{file} may be written by others than this user")
    line, _, rows = content.partition(b"\n")
    try:
        head = _Head.model_validate_json(line)
    except ValidationError as error:
        raise SnapshotError(f"{file} is damaged or of another version of Hearth") from error
    if head.format != FORMAT:
        raise SnapshotError(
            f"{file} has format {head.format}, not {FORMAT}: another version of Hearth wrote it"
        )
    if head.database != database:
        raise SnapshotError(f"{file} is of another database")
    if hashlib.sha256(rows).hexdigest() != head.sha256:
        raise SnapshotError(f"{file} is damaged")
    lines = rows.splitlines()
    try:
        snapshot = Snapshot(
            database=head.database,
            version=head.version,
            read_at=max(head.read_at, int(status.st_mtime * 1000)),
            plans=tuple(Plan.model_validate_json(row) for row in lines[: head.plans]),
            tenants=tuple(
                Tenant.model_validate_json(row) for row in lines[head.plans : head.plans + head.tenants]
            ),
            keys=tuple(Key.model_validate_json(row) for row in lines[head.plans + head.tenants :]),
        )
    except ValidationError as error:
        raise SnapshotError(f"{file} holds rows of another version of Hearth") from error
    return snapshot


class SnapshotKeeper:
    """Keeps one worker's file up to date, off the event loop.

    It is written when something has changed. While nothing does, its time is set anew each minute: when the
    database was last seen to be like it.
    """

    def __init__(self, file: Path, now_ms: Callable[[], int], *, mark_s: float = _MARK_S) -> None:
        self._file, self._now_ms, self._mark_s = file, now_ms, mark_s
        #: Changes that were tried last, and those that are in the file by this worker.
        self._tried, self._kept = -1, -1
        self._at = -math.inf

    def due(self, version: int) -> bool:
        """Whether `keep` has something to do for what is known at this count of changes."""
        return version != self._tried or time.monotonic() - self._at >= self._mark_s

    async def keep(self, snapshot: Snapshot) -> None:
        """Writes the file, or marks it; a failure is told in the log and tried again a minute later.

        Where another worker's later reading is there, it is tried again too: were that one the older state
        after all, it would not stay.
        """
        self._tried, self._at = snapshot.version, time.monotonic()
        try:
            if self._kept == snapshot.version and await asyncio.to_thread(_mark, self._file):
                return
            written = await asyncio.to_thread(write_snapshot, self._file, snapshot, now_ms=self._now_ms())
        except OSError as error:
            self._kept = -1
            log.error(
                "%s cannot be written: %s. A gateway that starts while the database is away will know older "
                "keys, or none.",
                self._file,
                error.strerror,
            )
            return
        self._kept = snapshot.version if written else -1


def _mark(file: Path) -> bool:
    """Sets the file's time; False where it is gone."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    return True


def _dump(snapshot: Snapshot) -> bytes:
    # Row by row, so that the interpreter can turn to the event loop in between.
    models: tuple[BaseModel, ...] = (*snapshot.plans, *snapshot.tenants, *snapshot.keys)
    rows = b"\n".join(row.model_dump_json().encode() for row in models)
    head = _Head(
        format=FORMAT,
        database=snapshot.database,
        version=snapshot.version,
        read_at=snapshot.read_at,
        plans=len(snapshot.plans),
        tenants=len(snapshot.tenants),
        keys=len(snapshot.keys),
        sha256=hashlib.sha256(rows).hexdigest(),
    )
    return head.model_dump_json().encode() + b"\n" + rows


def _head_of(file: Path) -> _Head | None:
    """The head of what is there; None where that is of no use."""
    try:
        line, _, rows = file.read_bytes().partition(b"\n")
        head = _Head.model_validate_json(line)
    except (OSError, ValidationError):
        return None
    return head if hashlib.sha256(rows).hexdigest() == head.sha256 else None


def _supersedes(new: Snapshot, old: _Head | None, now_ms: int) -> bool:
    if old is None or old.format != FORMAT or old.database != new.database:
        return True
    if old.read_at > now_ms + _CLOSE_MS:
        # Written before the clock was set back: it says nothing about which came first.
        return True
    later_ms = new.read_at - old.read_at
    if abs(later_ms) > _CLOSE_MS:
        return later_ms > 0
    return new.version > old.version


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time replace the file (`flock` on its folder, gone with the process)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
