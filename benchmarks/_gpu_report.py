"""What the GPU check measures, what follows from it, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

#: How far the planned memory may be from the used one, as a share of the used one.
MEMORY_BUDGET = 0.05
GIB = 2**30


@dataclass(frozen=True)
class Turn:
    """One wake and the sleep after it; seconds."""

    wake_s: float
    #: From the first request after it to its first byte.
    first_s: float
    sleep_s: float
    #: Memory of all models together while this one was awake, bytes.
    used_bytes: int
    #: Whether the answer was one that it gave before it slept.
    same: bool


@dataclass
class Record:
    """All that was measured of one model; times in seconds, memory in bytes on the device."""

    model: str
    weights: str
    planned_bytes: int
    planned_asleep_bytes: int
    start_s: float = 0.0
    #: The very first request: what warming up takes off the users.
    cold_first_s: float = 0.0
    #: The first one after warm-up, so a user's first.
    ready_first_s: float = 0.0
    steady_first_s: list[float] = field(default_factory=list)
    used_bytes: int = 0
    used_asleep_bytes: int = 0
    first_sleep_s: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    @property
    def steady_s(self) -> float:
        """The median time to the first byte in the steady state."""
        return statistics.median(self.steady_first_s)

    @property
    def ready_ratio(self) -> float:
        """The first request after ready over the steady state; 1 = no cold start."""
        return self.ready_first_s / self.steady_s

    @property
    def memory_error(self) -> float:
        """Planned over used, less one: positive = planned too much."""
        return relative_error(self.planned_bytes, self.used_bytes)

    @property
    def wake_s(self) -> float:
        return statistics.median(turn.wake_s for turn in self.turns)

    @property
    def sleep_s(self) -> float:
        return statistics.median(turn.sleep_s for turn in self.turns)

    @property
    def woken_first_s(self) -> float:
        return statistics.median(turn.first_s for turn in self.turns)

    def document(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self) | {
            "steady_s": round(self.steady_s, 4),
            "ready_ratio": round(self.ready_ratio, 2),
            "memory_error": round(self.memory_error, 4),
            "wake_s": round(self.wake_s, 3),
            "sleep_s": round(self.sleep_s, 3),
            "woken_first_s": round(self.woken_first_s, 4),
        }


def relative_error(planned: int, used: int) -> float:
    """(planned - used) / used; infinite where nothing is used."""
    return (planned - used) / used if used else float("inf")


def missed(records: Sequence[Record]) -> list[str]:
    """What is not as it must be, in words."""
    found = []
    for record in records:
        if abs(record.memory_error) > MEMORY_BUDGET:
            found.append(
                f"{record.model}: planned {_gib(record.planned_bytes)}, used {_gib(record.used_bytes)}: "
                f"{record.memory_error:+.1%}, the budget is {MEMORY_BUDGET:.0%}"
            )
        found += answers_changed(record)
    return found


def answers_changed(record: Record) -> list[str]:
    """Rounds after which a model said something else than before it slept."""
    wrong = [number for number, turn in enumerate(record.turns, 1) if not turn.same]
    if not wrong:
        return []
    return [
        f"{record.model}: after waking (round {', '.join(map(str, wrong))}) it answered otherwise than before"
    ]


def show(records: Sequence[Record], console: Console, *, judged: bool) -> None:
    """For a person; ``judged``: whether planned and used memory can be compared here."""
    table = Table(title="Standby models that take turns")
    table.add_column("seconds", no_wrap=True)
    for name in ("start", "cold", "ready", "steady", "wake", "woken", "sleep"):
        table.add_column(name, justify="right")
    for r in records:
        times = (r.cold_first_s, r.ready_first_s, r.steady_s, r.wake_s, r.woken_first_s, r.sleep_s)
        table.add_row(r.model, f"{r.start_s:.1f}", *(f"{time:.3f}" for time in times))
    console.print(table)
    console.print(
        "cold, ready, steady, woken: to the first byte of the first answer ever, of the first after"
    )
    console.print("warm-up, of later ones (median), of the first after a wake (median).")
    memory = Table(title="Memory" if judged else "Memory (of processes; not what a plan for a GPU reckons)")
    memory.add_column("", no_wrap=True)
    for name in ("planned", "used", "error", "asleep: planned", "used"):
        memory.add_column(name, justify="right")
    for r in records:
        error = f"{r.memory_error:+.1%}" if judged else ""
        sizes = (_gib(r.planned_bytes), _gib(r.used_bytes), error)
        memory.add_row(r.model, *sizes, _gib(r.planned_asleep_bytes), _gib(r.used_asleep_bytes))
    console.print(memory)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
