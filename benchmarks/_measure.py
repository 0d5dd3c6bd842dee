"""What processes take of the machine, and how a result is written down."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"


def processes_of(groups: Iterable[int]) -> list[psutil.Process]:
    """The living processes of these process groups or sessions (a leader's number names both)."""
    wanted = set(groups)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            mine = {os.getpgid(process.pid), os.getsid(process.pid)}
            if mine & wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of the processes together, bytes; a shared page counts once, split among those that share it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += int(psutil.Process(pid).memory_full_info().pss)
    return total


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """Processor time used so far by each process, seconds."""
    used = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            used[pid] = times.user + times.system
    return used


def cpu_share(pids: Iterable[int], seconds: float) -> float:
    """Processor time that the processes use in the next ``seconds``, as a share of one core (0.1 = 10 %)."""
    pids = list(pids)
    began, before = time.monotonic(), cpu_seconds(pids)
    time.sleep(seconds)
    after = cpu_seconds(pids)
    spent = sum(after[pid] - before[pid] for pid in after.keys() & before.keys())
    return spent / (time.monotonic() - began)


def machine() -> dict[str, Any]:
    """The machine and how busy it is, to be kept beside every number."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes ``results/NAME.json`` and gives its path."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
