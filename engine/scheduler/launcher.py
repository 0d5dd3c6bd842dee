"""Effects on process groups: start, watch, end. The one place that forks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from engine.scheduler import groups
from engine.scheduler.gpu_memory import GpuMemory
from engine.scheduler.units import ProcessRef

#: A log that has grown to this many bytes is set aside (as ``<name>.log.1``).
LOG_BYTES = 16 * 1024 * 1024
#: Children of an ended leader may take this long to end by themselves, seconds.
_PATIENCE_S = 1.0
_TAIL_LINES = 8
_TAIL_BYTES = 8192


class LaunchError(Exception):
    """A process could not be started; the message says why."""


@dataclass(frozen=True)
class Order:
    """One process to start."""

    unit: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    log: Path
    #: Where standard output goes; None = into the log.
    output: Path | None = None
    pass_fds: tuple[int, ...] = field(default=())
    #: GPUs that it stands on, as in ``CUDA_VISIBLE_DEVICES``; '' = none.
    gpus: str = ""


class Launcher(Protocol):
    """What the supervisor needs of the operating system; tests hand in a fake."""

    def launch(self, order: Order) -> ProcessRef: ...

    async def exited(self, ref: ProcessRef) -> int | None: ...

    def terminate(self, ref: ProcessRef) -> None: ...

    async def sweep(self, ref: ProcessRef, *, at_once: bool) -> None: ...

    def log_tail(self, unit: str) -> tuple[str, ...]: ...

    def trim_logs(self) -> None: ...

    def memory(self, ref: ProcessRef) -> int: ...


class LocalLauncher:
    """Processes of this machine, each the leader of a session and process group of its own."""

    def __init__(self, scope: str, gpus: GpuMemory | None = None) -> None:
        """``scope`` begins every token, so that all that this state folder started can be found.

        ``gpus``: who waits for GPU memory to come back; None = by the driver's own figures.
        """
        self._scope = scope
        self._gpus = gpus or GpuMemory()
        self._children: dict[ProcessRef, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, tuple[Path, int]] = {}

    def launch(self, order: Order) -> ProcessRef:
        """Starts a process.

        Raises:
            LaunchError: the program cannot be run or the log not be written.
        """
        token = f"{self._scope}/{order.unit}/{secrets.token_hex(8)}"
        # Without SPT_NOENV setproctitle, which vLLM uses, writes over the environment that holds the token.
        environment = {**order.environment, groups.TOKEN_VARIABLE: token, "SPT_NOENV": "1"}
        try:
            with contextlib.ExitStack() as files:
                log = files.enter_context(self._open_log(order))
                output = files.enter_context(order.output.open("wb")) if order.output else log
                child = subprocess.Popen(
                    order.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=log,
                    cwd=order.folder,
                    env=environment,
                    pass_fds=order.pass_fds,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            raise LaunchError(f"{order.unit} could not be started ({order.argv[0]}): {error}") from error
        ref = groups.refer(child.pid, token)
        if ref is None:  # cannot be while we have not waited for it
            raise LaunchError(f"{order.unit} could not be started: its process {child.pid} is not to be seen")
        self._children[ref] = child
        self._gpus.stands_on(ref, order.gpus)
        return ref

    def _open_log(self, order: Order) -> BinaryIO:
        log = order.log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_name(log.name + ".1"))
        file = log.open("ab")
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"{stamp} hearth: starting {order.unit}\n".encode())
        file.flush()
        self._logs[order.unit] = (log, file.tell())
        return file

    async def exited(self, ref: ProcessRef) -> int | None:
        """The leader's exit status once it has ended: negative for a signal, None for one not our child."""
        await _ended(ref)
        return _exit_status(ref.pid) if ref in self._children else None

    def terminate(self, ref: ProcessRef) -> None:
        """SIGTERM to the leader alone: it lets requests finish, for which it may need its children."""
        groups.signal_leader(ref, signal.SIGTERM)

    async def sweep(self, ref: ProcessRef, *, at_once: bool) -> None:
        """Ends everything that the leader started, and the leader.

        Returns when nothing of it lives and the memory of its GPUs is back.
        """
        left = await asyncio.to_thread(groups.members, ref)
        await asyncio.to_thread(self._gpus.observe, ref, left)
        if left and not at_once:
            groups.signal_each(left, signal.SIGTERM)
            patience = time.monotonic() + _PATIENCE_S
            while left and time.monotonic() < patience:
                await asyncio.sleep(0.05)
                left = await asyncio.to_thread(groups.members, ref)
        pause = 0.02
        while left:
            groups.signal_each(left, signal.SIGKILL)
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)
            left = await asyncio.to_thread(groups.members, ref)
        child = self._children.pop(ref, None)
        if child is not None:
            child.wait()
        await self._gpus.returned(ref)

    def log_tail(self, unit: str) -> tuple[str, ...]:
        """The last lines that this start of the unit has logged."""
        log, start = self._logs.get(unit, (None, 0))
        if log is None:
            return ()
        try:
            with log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(start, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ()
        lines = [line.rstrip()[:400] for line in text.splitlines() if line.strip()]
        return tuple(lines[-_TAIL_LINES:])

    def trim_logs(self) -> None:
        """Sets aside what logs hold that have grown too big while their processes write on."""
        for unit, (log, _) in list(self._logs.items()):
            try:
                if log.stat().st_size > LOG_BYTES:
                    shutil.copyfile(log, log.with_name(log.name + ".1"))
                    # The writers append, so they go on at the new end.
                    os.truncate(log, 0)
                    self._logs[unit] = (log, 0)
            except OSError:
                continue

    def memory(self, ref: ProcessRef) -> int:
        """Bytes (PSS) of the leader's session."""
        members = groups.session_members(ref)
        self._gpus.observe(ref, members)
        return groups.memory_of(members)


async def _ended(ref: ProcessRef) -> None:
    """Waits until the process has ended, ours or not, without asking again and again."""
    try:
        handle = os.pidfd_open(ref.pid)
    except ProcessLookupError:
        return
    except OSError:  # a kernel or sandbox without pidfds
        while groups.lives(ref):  # noqa: ASYNC110  there is nothing to wait on
            await asyncio.sleep(0.5)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        # Only now is it sure that the handle is of this process and not of one that took its number.
        if groups.lives(ref):
            loop.add_reader(handle, ended.set)
            await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _exit_status(pid: int) -> int | None:
    """The status of an ended child, negative for a signal.

    It is left unreaped until the sweep: while its number is taken, its session cannot be mistaken.
    """
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def describe_exit(code: int | None) -> str:
    """An exit status for a person."""
    if code is None:
        return "its process has ended"
    if code >= 0:
        return f"its process has ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"its process was killed by signal {-code} ({name}){hint}"
