"""Process groups as the kernel shows them: who lives, who belongs to whom, and how they are ended.

Three facts tell whether a process is ours: the number, its start time (numbers are used again, a number with
its start time is not), and a token in the environment of all that we start, which children inherit. The token
finds what the number cannot: a child whose leader has died, and one that has left its session.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.scheduler.units import ProcessRef

#: The environment variable that holds the token.
TOKEN_VARIABLE = "SERVED_BY_HEARTH"
_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Seen:
    """One process, as ``/proc/PID/stat`` shows it."""

    pid: int
    state: str
    group: int
    session: int
    started: int

    @property
    def lives(self) -> bool:
        """False for a zombie: it holds nothing but its number."""
        return self.state not in ("Z", "X", "x")


def see(pid: int) -> Seen | None:
    """The process with this number now, or None."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name in brackets may hold anything, so count from its last bracket.
    fields = text[text.rindex(b")") + 2 :].split()
    return Seen(pid, fields[0].decode(), int(fields[2]), int(fields[3]), int(fields[19]))


def refer(pid: int, token: str) -> ProcessRef | None:
    """A lasting reference to a process that lives now; None when it is already gone."""
    seen = see(pid)
    return ProcessRef(pid, seen.started, token) if seen else None


def lives(ref: ProcessRef) -> bool:
    """Whether this very process lives (a zombie does not)."""
    seen = see(ref.pid)
    return seen is not None and seen.lives and seen.started == ref.started


def token_of(pid: int) -> str | None:
    """The token in a process's environment; None when it has none or may not be read."""
    try:
        environment = (_PROC / str(pid) / "environ").read_bytes()
    except (OSError, ProcessLookupError):
        return None
    start = TOKEN_VARIABLE.encode() + b"="
    for item in environment.split(b"\0"):
        if item.startswith(start):
            return item[len(start) :].decode(errors="replace")
    return None


def _every() -> Iterator[Seen]:
    for name in os.listdir(_PROC):  # noqa: PTH208  names are enough, and this runs over every process
        if name.isdigit() and (seen := see(int(name))) and seen.lives:
            yield seen


def members(ref: ProcessRef) -> list[int]:
    """Every living process that the referred one started, itself included.

    Those with its token, wherever they are now; and, while the leader lives or the number is not in use by
    another, those of its session whose environment cannot be told (a program may have written over it).
    """
    leader = see(ref.pid)
    taken_over = leader is not None and leader.started != ref.started
    found = []
    for seen in _every():
        token = token_of(seen.pid)
        in_session = not taken_over and ref.pid in (seen.session, seen.group) and seen.started >= ref.started
        is_leader = seen.pid == ref.pid and not taken_over
        if token == ref.token or is_leader or (in_session and _leader_vouches(leader, token)):
            found.append(seen.pid)
    return found


def _leader_vouches(leader: Seen | None, token: str | None) -> bool:
    # Without its leader (not even as a zombie) a session's number may have been used by strangers since.
    return leader is not None and token is None


def with_token(belongs: Callable[[str], bool]) -> dict[int, str]:
    """Living processes (pid -> token) whose token satisfies ``belongs``; this process itself is left out."""
    found = {}
    for seen in _every():
        token = token_of(seen.pid) if seen.pid != os.getpid() else None
        if token is not None and belongs(token):
            found[seen.pid] = token
    return found


def signal_leader(ref: ProcessRef, number: signal.Signals) -> bool:
    """Signals the process itself; False when it no longer lives."""
    if not lives(ref):
        return False
    try:
        os.kill(ref.pid, number)
    except ProcessLookupError:
        return False
    return True


def signal_each(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def memory_of(pids: Iterable[int]) -> int:
    """Proportional set size of the processes together, bytes (resident size where that cannot be read)."""
    total = 0
    for pid in pids:
        try:
            text = (_PROC / str(pid) / "smaps_rollup").read_bytes()
            line = next(line for line in text.splitlines() if line.startswith(b"Pss:"))
            total += int(line.split()[1]) * 1024
        except (OSError, StopIteration, ProcessLookupError):
            with contextlib.suppress(OSError, ProcessLookupError, IndexError):
                total += int((_PROC / str(pid) / "statm").read_bytes().split()[1]) * _PAGE
    return total


def session_members(ref: ProcessRef) -> list[int]:
    """Living processes of the leader's session: cheap, for measuring only."""
    return [seen.pid for seen in _every() if seen.session == ref.pid]
