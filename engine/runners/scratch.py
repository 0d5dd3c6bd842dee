"""What a runner has outside its own memory: a temporary folder, shared memory and semaphores.

A killed runner cannot clean up, so the names tell whose they are: the next start of the same replica, or the
end of the scheduler, removes what is left.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
#: Read by ``shim/sitecustomize.py``: how the names of shared memory and semaphores begin.
SHM_VARIABLE = "_HEARTH_SHM"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def folder_of(socket: Path) -> Path:
    """The temporary folder of the runner that serves on ``socket``; short, since sockets stand in it."""
    return socket.parent / f"t-{_digest(socket.name)}"


def shm_prefix(socket: Path) -> str:
    """How the runner's shared memory names begin."""
    return f"{shm_scope(socket.parent)}{_digest(socket.name)}-"


def shm_scope(folder: Path) -> str:
    """How the shared memory names of all runners begin whose sockets stand in ``folder``."""
    return f"hearth-{_digest(str(folder))}-"


def clear(socket: Path) -> None:
    """Removes what an earlier process of this runner left."""
    shutil.rmtree(folder_of(socket), ignore_errors=True)
    _remove_shared(shm_prefix(socket))


def clear_shared(folder: Path) -> None:
    """Removes the shared memory of every runner whose socket stood in ``folder``; none of them may live."""
    _remove_shared(shm_scope(folder))


def _remove_shared(prefix: str) -> None:
    # The kernel keeps named semaphores there too, as `sem.NAME`.
    for pattern in (f"{prefix}*", f"sem.{prefix}*"):
        for file in SHARED_MEMORY.glob(pattern):
            file.unlink(missing_ok=True)
