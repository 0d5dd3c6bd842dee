"""Ending what a scheduler that is no more left running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from engine.config import Config
from engine.runners import scratch
from engine.scheduler import groups
from engine.scheduler.statefile import StateFile, UnitRecord, load, write_atomically

#: A process that lives this long after SIGKILL hangs in the kernel, seconds.
_UNKILLABLE_S = 10.0


class SchedulerError(Exception):
    """The scheduler cannot start or stop; the message says why and what to do."""


def scope_of(config: Config) -> str:
    """What the tokens of all processes of this state folder begin with."""
    return config.runtime_dir.name


@contextlib.contextmanager
def sole_scheduler(config: Config) -> Iterator[None]:
    """Holds the state folder for this process; the kernel lets go of it when the process ends in any way.

    Raises:
        SchedulerError: another scheduler holds it, or it cannot be written.
    """
    state_dir = config.state_dir.expanduser().resolve()
    file = state_dir / "scheduler.lock"
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SchedulerError(
            f"the state folder {state_dir} cannot be written: {error.strerror}. "
            "Set `state_dir` to one that can."
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise SchedulerError(
                f"Hearth already runs on {state_dir} (process {holder}). `hearth status` shows it, "
                "`hearth stop` ends it; a second one needs another `state_dir` and port."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def living(state: StateFile) -> tuple[list[UnitRecord], list[UnitRecord]]:
    """The recorded units whose leader lives, and those of which only other processes live."""
    whole, broken = [], []
    for unit in state.units:
        if groups.lives(unit.process):
            whole.append(unit)
        elif groups.members(unit.process):
            broken.append(unit)
    return whole, broken


def end_strays(config: Config, known: list[UnitRecord]) -> list[int]:
    """Kills processes of this state folder that no record knows; their numbers.

    Such are the rest of a group whose leader has died, and what was started just before a scheduler was
    killed.

    Raises:
        SchedulerError: some do not die.
    """
    tokens = {unit.token for unit in known}
    scope = scope_of(config) + "/"
    ended: set[int] = set()
    deadline = time.monotonic() + _UNKILLABLE_S
    while strays := groups.with_token(lambda token: token.startswith(scope) and token not in tokens):
        ended |= set(strays)
        if time.monotonic() > deadline:
            numbers = ", ".join(map(str, sorted(strays)))
            raise SchedulerError(
                f"processes {numbers} of an earlier Hearth do not die; look at them with `ps`."
            )
        groups.signal_each(strays, signal.SIGKILL)
        time.sleep(0.02)
    return sorted(ended)


def stop_leftovers(config: Config) -> list[str]:
    """Ends all that a scheduler that is no more left running; says what, in lines for a person.

    Blocks for at most the drain and stop times of the configuration.

    Raises:
        SchedulerError: a scheduler lives; it is to be asked instead.
    """
    with sole_scheduler(config):
        state = load(config.state_file)
        lines = [f"Stopped {unit.id} (process {unit.pid})." for unit in _end_all(config, state)]
        lines += [f"Stopped process {pid}." for pid in end_strays(config, [])]
        state.units, state.scheduler_pid = [], 0
        if config.state_file.exists():
            write_atomically(config.state_file, state.model_dump_json(indent=1))
        config.routes_file.unlink(missing_ok=True)
        remove_runtime(config)
    return lines


def _end_all(config: Config, state: StateFile) -> list[UnitRecord]:
    whole, broken = living(state)
    # Gateways first: what they still carry needs the runners.
    for kinds in (("gateway", "preparation"), ("runner",)):
        chosen = [unit for unit in whole if unit.kind in kinds]
        for unit in chosen:
            groups.signal_leader(unit.process, signal.SIGTERM)
        deadline = time.monotonic() + config.scheduler.drain_s + config.scheduler.stop_timeout_s
        while any(groups.lives(unit.process) for unit in chosen) and time.monotonic() < deadline:
            time.sleep(0.05)
    for unit in (*whole, *broken):
        while left := groups.members(unit.process):
            groups.signal_each(left, signal.SIGKILL)
            time.sleep(0.02)
    return [*whole, *broken]


def make_runtime(folder: Path) -> None:
    """Makes the folder of the sockets, for this user alone.

    Raises:
        SchedulerError: somebody else's folder (or a link) stands there.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise SchedulerError(f"the socket folder {folder} cannot be made: {error.strerror}.") from error
    if folder.is_symlink() or not folder.is_dir() or found.st_uid != os.getuid():
        raise SchedulerError(
            f"{folder} belongs to somebody else or is a link, so sockets there would not be safe. "
            "Remove it, or set XDG_RUNTIME_DIR to a folder of this user."
        )
    folder.chmod(0o700)


def remove_runtime(config: Config) -> None:
    """Removes the folder of the sockets with all that is in it, and the runners' shared memory."""
    folder = config.runtime_dir
    if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
        shutil.rmtree(folder, ignore_errors=True)
        scratch.clear_shared(folder)
