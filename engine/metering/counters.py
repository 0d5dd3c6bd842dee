"""A worker's own count of what it recorded, where another process can read it, also after a kill.

The file is mapped into memory, so an update costs no system call and outlives the process. Two updates frame
each write to the journal: before it the rows are `waiting`, after it they are `recorded`. Whenever the worker
is killed, the durable rows are at least `recorded` and at most `recorded + waiting`.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".counters"
_MARK = b"HCT1"
#: Mark, boot, since, recorded, charge (more than 64 bits may add up), waiting; a CRC-32 of them follows.
_FORM = struct.Struct("<4s16sqQ16sQ")
_CHECK = struct.Struct("<I")
_BYTES = _FORM.size + _CHECK.size
#: Tries to read a file that is being updated.
_TRIES = 200


@dataclass
class Counters:
    """What a writer did since it began; compared with the ledger by `verify`."""

    worker: str
    #: Unix milliseconds when it began.
    since: int
    #: Rows for which `record` returned, and the sum of their charges.
    recorded: int = 0
    charge: int = 0
    #: Rows that are waiting to become durable.
    waiting: int = 0
    #: How rows became durable, and how many were folded into the database later.
    to_database: int = 0
    to_journal: int = 0
    folded: int = 0
    #: Transactions that folded: rows divided by these is the size of a batch.
    flushes: int = 0


class Tally:
    """The counters of this life in their file; used by one thread."""

    def __init__(self, folder: Path, worker: str) -> None:
        """Makes `<folder>/<worker>.counters`.

        Raises:
            OSError: it cannot be made.
        """
        self.recorded = self.charge = self.waiting = 0
        self._since, self._boot = time.time_ns() // 1_000_000, boot_id()
        handle = os.open(folder / f"{worker}{SUFFIX}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, _BYTES)
            self._memory = mmap.mmap(handle, _BYTES)
        finally:
            os.close(handle)
        self._keep()

    def begin(self, rows: int) -> None:
        """Rows are about to be written."""
        self.waiting += rows
        self._keep()

    def end(self, rows: int, charge: int, *, durable: bool) -> None:
        """They were written, or are known not to be."""
        self.waiting -= rows
        if durable:
            self.recorded += rows
            self.charge += charge
        self._keep()

    def close(self) -> None:
        """Unmaps the file, which stays."""
        self._memory.close()

    def _keep(self) -> None:
        body = _FORM.pack(
            _MARK, self._boot, self._since, self.recorded, self.charge.to_bytes(16, "little"), self.waiting
        )
        self._memory[:] = body + _CHECK.pack(zlib.crc32(body))


def read_counters(folder: Path) -> list[Counters]:
    """The counters of all lives that left some in a folder, living and dead.

    Those of a machine that went down since may be older than its rows: any number of rows may be `waiting`.
    """
    found = (_read(file) for file in sorted(folder.glob(f"*{SUFFIX}")))
    return [counters for counters in found if counters is not None]


def _read(file: Path) -> Counters | None:
    for attempt in range(_TRIES):
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        body = data[: _FORM.size]
        if len(data) == _BYTES and _CHECK.unpack(data[_FORM.size :])[0] == zlib.crc32(body):
            break
        # It is being made or updated, which takes less than a microsecond.
        time.sleep(0.001 if attempt > 20 else 0)
    else:
        return None
    mark, boot, since, recorded, charge, waiting = _FORM.unpack(body)
    if mark != _MARK:
        return None
    counters = Counters(file.name.removesuffix(SUFFIX), since, recorded, int.from_bytes(charge, "little"))
    counters.waiting = waiting if boot == boot_id() else 2**63
    return counters


def boot_id() -> bytes:
    """16 bytes that are others after each start of the machine."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return bytes.fromhex(text.replace("-", ""))[:16].ljust(16, b"\0")
    except (OSError, ValueError):
        return bytes(16)
