"""`python -m benchmarks.gateway`: what the gateway's hop costs.

A mock runner answers on a Unix socket; the same client drives it directly (the bound), through a *bare*
gateway process (no keys, no limits, no fairness, no ledger) and through a *metered* one: a key under a plan
with every kind of limit, fair queueing, and the SQLite ledger, each row on the disk before its answer's
last byte. Both write the access log. A gateway has one core to itself; the client and mock runner share the
others. Each number is the median of several runs, the three in turns. What metering costs is the metered
one against the bare one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks._http import Load, Responder, drive, request
from benchmarks._measure import cpu_seconds, machine, write_result
from engine.config import ROOT, Config, load
from engine.metering import keys, planstore
from engine.metering.journal import Journal
from engine.metering.opening import opened
from engine.metering.plans import read_spec
from engine.routes import ModelRoute, Replica, RouteTable

MODEL = "mock"
KEY = "hearth-benchmark-key-of-no-use-elsewhere"
PATH = "/v1/chat/completions"
_START_S = 30.0
#: Of the disk's measure: writes, and about the bytes of a ledger row.
_DISK_WRITES, _ROW_BYTES = 500, 350

#: Where to send requests, and the process whose processor time counts.
Target = tuple[Path | tuple[str, int], int]


@dataclass(frozen=True)
class Case:
    """One kind of load."""

    name: str
    body: bytes
    callers: int
    seconds: float
    most: int


def chat_body(size: int) -> bytes:
    """A chat completion's JSON of about ``size`` bytes."""
    words = ("The quick brown fox jumps over the lazy dog. " * (size // 45 + 1))[:size]
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": words}]}).encode()


def cases(seconds: float) -> list[Case]:
    return [
        Case("64 callers", chat_body(1000), 64, seconds, 200_000),
        Case("one caller", chat_body(1000), 1, seconds, 10_000),
        Case("5 MB bodies", chat_body(5_000_000), 1, seconds, 100),
    ]


def cores() -> tuple[set[int], set[int]]:
    """The gateway's core and the others (the same one where there is only one)."""
    available = sorted(os.sched_getaffinity(0))
    return {available[-1]}, set(available[:-1]) or {available[-1]}


def run_mock_runner(path: str, answer: bytes, on: set[int]) -> None:
    """A process: the mock runner on a Unix socket."""
    os.sched_setaffinity(0, on)

    async def main() -> None:
        server = await asyncio.get_running_loop().create_unix_server(lambda: Responder(answer), path)
        async with server:
            await server.serve_forever()

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main())


def answer() -> bytes:
    """A short chat completion as it goes over the wire."""
    message = {"role": "assistant", "content": "Paris is the capital of France.", "refusal": None}
    body = json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28},
        }
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def mock_runner(path: Path, on: set[int]) -> Iterator[int]:
    """The mock runner in a process of its own; its process id."""
    process = multiprocessing.get_context("spawn").Process(
        target=run_mock_runner, args=(str(path), answer(), on)
    )
    process.start()
    try:
        _wait(path.exists, "the mock runner")
        assert process.pid is not None
        yield process.pid
    finally:
        process.terminate()
        process.join(10)


#: Everything off that a request costs beside being passed on.
BARE: dict[str, Any] = {"auth": False, "metering": {"enabled": False}, "fairness": {"enabled": False}}
#: Limits of every kind, none of which is reached.
PLAN = {
    "price": 2,
    "included": 1000,
    "budget": {"limit": 10**9},
    "requests_per_minute": 10**7,
    "requests_per_day": 10**9,
    "concurrent": 1000,
}


@contextmanager
def gateway(
    folder: Path, runner: Path, on: set[int], **settings: Any
) -> Iterator[tuple[tuple[str, int], int]]:
    """A gateway process with one model in its table; its address and process id."""
    folder.mkdir(exist_ok=True)
    config = load(state_dir=folder, **settings)
    config.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    asyncio.run(_make_key(config))
    route = ModelRoute(
        id=MODEL,
        category="chat",
        state="ready",
        max_batch=256,
        replicas=[Replica(id="mock-0", socket=str(runner))],
    )
    config.routes_file.write_text(RouteTable(version=1, models=[route]).model_dump_json())
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    host, port = listener.getsockname()
    listener.set_inheritable(True)
    command = [sys.executable, "-m", "engine.gateway", "--settings", str(_settings(config, folder))]
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--fd", str(listener.fileno())],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
        )
    os.sched_setaffinity(process.pid, on)
    listener.close()
    try:
        _wait(lambda: _answers(f"http://{host}:{port}/health"), "the gateway")
        yield (host, port), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        shutil.rmtree(config.runtime_dir, ignore_errors=True)


async def _make_key(config: Config) -> None:
    async with opened(config) as database:
        await planstore.create(database, "bench", read_spec(PLAN), unit="minor", currency="EUR")
        await keys.create(database, key=KEY, plan="bench")


def _settings(config: Config, folder: Path) -> Path:
    file = folder / "gateway.json"
    file.write_text(json.dumps({"config": config.model_dump(mode="json", exclude={"api_key"})}))
    return file


def _wait(ready: Any, what: str) -> None:
    began = time.monotonic()
    while not ready():
        if time.monotonic() - began > _START_S:
            raise SystemExit(f"{what} did not start within {_START_S:.0f} s.")
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=1) as found:
            return bool(found.status == 200)
    except OSError:
        return False


def measure(case: Case, targets: dict[str, Target], runs: int) -> dict[str, dict[str, float]]:
    """Requests per second, latencies and processor time of each target: the medians over the runs."""
    message = request(PATH, case.body, Authorization=f"Bearer {KEY}")
    loads: dict[str, list[Load]] = {name: [] for name in targets}
    spent: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(runs):
        for name, (address, pid) in targets.items():
            before = cpu_seconds([pid])[pid]
            work = drive(address, message, callers=case.callers, seconds=case.seconds, most=case.most)
            load = uvloop.run(work)
            loads[name].append(load)
            spent[name].append(1000 * (cpu_seconds([pid])[pid] - before) / len(load.latencies))
    found = {
        name: {
            "per_second": round(statistics.median(load.per_second for load in found), 1),
            "p50_ms": round(statistics.median(load.percentile_ms(0.50) for load in found), 3),
            "p99_ms": round(statistics.median(load.percentile_ms(0.99) for load in found), 3),
            "server_cpu_ms": round(statistics.median(spent[name]), 3),
        }
        for name, found in loads.items()
    }
    # Of runs that followed each other: a machine that is slow for a while is so for both.
    pairs = list(zip(loads["bare"], loads["metered"], strict=True))
    found["paired"] = {
        "share": round(statistics.median(b.per_second / a.per_second for a, b in pairs), 3),
        "added_ms": round(
            statistics.median(b.percentile_ms(0.5) - a.percentile_ms(0.5) for a, b in pairs), 3
        ),
    }
    return found


def disk_ms(folder: Path) -> float:
    """What the disk takes at least to make one row durable: rows one after another, without a pause."""
    spent = []
    with Journal(folder / "disk.journal", most_bytes=1 << 20) as journal:
        for _ in range(_DISK_WRITES):
            began = time.perf_counter()
            journal.append([bytes(_ROW_BYTES)])
            spent.append(time.perf_counter() - began)
    return round(1000 * statistics.median(spent), 3)


def show(result: dict[str, Any], console: Console) -> None:
    """The result for a person."""
    table = Table(title=f"The gateway's hop (median of {result['runs']} runs)")
    for name in ("load", "", "requests/s", "p50, ms", "p99, ms", "added, ms", "CPU, ms"):
        table.add_column(name, justify="left" if name in ("load", "") else "right")
    for name, rows in result["cases"].items():
        for where, row in rows.items():
            if where == "paired":
                continue
            added = row["p50_ms"] - rows["direct"]["p50_ms"]
            table.add_row(
                name if where == "direct" else "",
                where,
                f"{row['per_second']:,.0f}",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                "" if where == "direct" else f"{added:.2f}",
                f"{row['server_cpu_ms']:.3f}",
                end_section=where == "metered",
            )
    console.print(table)
    for name, rows in result["cases"].items():
        paired = rows["paired"]
        console.print(
            f"{name}: metering leaves {paired['share']:.2f} of the requests per second and adds "
            f"{paired['added_ms']:.2f} ms to the p50 (medians over pairs of runs)."
        )
    console.print(f"The disk alone takes at least {result['disk_ms']:.2f} ms to make one row durable.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each load")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run")
    given = parser.parse_args()
    console = Console()
    for name in [name for name in os.environ if name.startswith("HEARTH_")]:
        del os.environ[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    before = machine()
    own, others = cores()
    os.sched_setaffinity(0, others)
    with tempfile.TemporaryDirectory(prefix="hearth-bench-") as name:
        folder = Path(name)
        runner = folder / "runner.sock"
        with (
            mock_runner(runner, others) as runner_pid,
            gateway(folder / "bare", runner, own, **BARE) as (bare, bare_pid),
            gateway(folder / "metered", runner, own) as (metered, metered_pid),
        ):
            targets: dict[str, Target] = {
                "direct": (runner, runner_pid),
                "bare": (bare, bare_pid),
                "metered": (metered, metered_pid),
            }
            measured = {case.name: measure(case, targets, given.runs) for case in cases(given.seconds)}
        disk = disk_ms(folder)
    result = {
        "machine": before,
        "runs": given.runs,
        "seconds": given.seconds,
        "cases": measured,
        "disk_ms": disk,
    }
    show(result, console)
    console.print(f"Written to {write_result('gateway', result)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
