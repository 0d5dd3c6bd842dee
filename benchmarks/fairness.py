"""`python -m benchmarks.fairness`: one key floods with long prompts, nine send short ones.

A gateway process with ten keys stands before a mock engine (benchmarks/_engine.py says of which kind). In
each round, in turns: the nine alone; with the flooder and fairness; with the flooder and
`fairness.enabled = false`. The nine ask again as soon as they are answered; so does each of the flooder's
connections. Shown is the median over the rounds of the p50 and p95 of the nine's latencies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks._engine import BYTES_PER_TOKEN, Speed, mock_engine
from benchmarks._measure import machine, write_result
from benchmarks.gateway import _answers, _settings, _wait, cores
from engine.config import ROOT, load
from engine.metering import keys
from engine.metering.opening import opened
from engine.routes import ModelRoute, Replica, RouteTable

MODEL = "mock"
NINE = [f"hearth-benchmark-key-of-no-use-elsewhere-{i}" for i in range(9)]
FLOODER = "hearth-benchmark-key-of-the-flooder-of-no-use"
PHASES = ("alone", "flood, fair", "flood, not fair")
#: Not counted at a phase's beginning, seconds.
_WARM_S = 2.0


@dataclass(frozen=True)
class Flood:
    """What the flooder sends."""

    name: str
    prompt: int
    completion: int
    callers: int = 16


SHORT = Flood("short", prompt=100, completion=100, callers=1)
FLOODS = {
    "chat": Flood("chat", prompt=8000, completion=64),
    "reading": Flood("reading", prompt=8000, completion=1),
    "writing": Flood("writing", prompt=2000, completion=512),
}


@dataclass
class Phase:
    """What one phase measured."""

    latencies: list[float] = field(default_factory=list)
    flooded: int = 0
    seconds: float = 0.0

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def body_of(flood: Flood) -> bytes:
    """A chat completion whose prompt is, for the mock engine, so many tokens long."""
    empty = json.dumps({"model": MODEL, "max_tokens": flood.completion, "messages": [_message("")]})
    text = ("All work and no play. " * flood.prompt)[: flood.prompt * BYTES_PER_TOKEN - len(empty)]
    message = {"model": MODEL, "max_tokens": flood.completion, "messages": [_message(text)]}
    return json.dumps(message).encode()


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def run(base: str, flood: Flood | None, seconds: float) -> Phase:
    """One phase against a gateway."""
    phase = Phase()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
        began = time.perf_counter() + _WARM_S
        until = began + seconds

        async def caller(key: str, body: bytes, flooder: bool) -> None:
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            while time.perf_counter() < until:
                sent = time.perf_counter()
                async with http.post(f"{base}/v1/chat/completions", data=body, headers=headers) as answer:
                    said = await answer.read()
                now = time.perf_counter()
                if answer.status == 200 and now >= began:
                    if not flooder:
                        phase.latencies.append(now - sent)
                    elif now <= until:
                        phase.flooded += 1
                elif answer.status not in (200, 429):
                    raise SystemExit(f"answered {answer.status}: {said[:300]!r}")
                elif answer.status == 429:
                    await asyncio.sleep(0.1)

        short = body_of(SHORT)
        nine = [asyncio.create_task(caller(key, short, False)) for key in NINE]
        long = []
        if flood is not None:
            sent = body_of(flood)
            long = [asyncio.create_task(caller(FLOODER, sent, True)) for _ in range(flood.callers)]
        await asyncio.gather(*nine)
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
    phase.seconds = seconds
    # What the flooder left behind is dropped by the engine; the next phase begins with an idle one.
    await asyncio.sleep(0.5)
    return phase


@contextmanager
def gateway(folder: Path, runner: Path, speed: Speed, on: set[int], *, fair: bool) -> Iterator[str]:
    """A gateway process whose table has the mock engine; its base URL."""
    folder.mkdir()
    config = load(state_dir=folder, fairness={"enabled": fair})
    config.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    asyncio.run(_make_keys(folder))
    route = ModelRoute(
        id=MODEL,
        category="chat",
        state="ready",
        max_batch=speed.max_batch,
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
        yield f"http://{host}:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        shutil.rmtree(config.runtime_dir, ignore_errors=True)


async def _make_keys(folder: Path) -> None:
    async with opened(load(state_dir=folder)) as database:
        for i, key in enumerate([*NINE, FLOODER]):
            await keys.create(database, key=key, name=f"key {i}")


def measure(flood: Flood, speed: Speed, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """The medians over the rounds, by phase."""
    found: dict[str, list[Phase]] = {name: [] for name in PHASES}
    own, others = cores()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hearth-bench-")))
        runner = folder / "runner.sock"
        stack.enter_context(mock_engine(runner, speed, others))
        fair = stack.enter_context(gateway(folder / "fair", runner, speed, own, fair=True))
        plain = stack.enter_context(gateway(folder / "plain", runner, speed, own, fair=False))
        _wait(runner.exists, "the mock engine")
        for _ in range(rounds):
            found["alone"].append(uvloop.run(run(fair, None, seconds)))
            found["flood, fair"].append(uvloop.run(run(fair, flood, seconds)))
            found["flood, not fair"].append(uvloop.run(run(plain, flood, seconds)))
    return {
        name: {
            "p50_ms": round(statistics.median(each.percentile_ms(0.50) for each in phases), 1),
            "p95_ms": round(statistics.median(each.percentile_ms(0.95) for each in phases), 1),
            "flooder_per_second": round(statistics.median(each.flooded / each.seconds for each in phases), 2),
        }
        for name, phases in found.items()
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The result for a person."""
    table = Table(title=f"Nine with short prompts, one floods (median of {result['rounds']} rounds)")
    for name in ("flood", "", "p50, ms", "p95, ms", "p95, times alone", "flooder, 1/s"):
        table.add_column(name, justify="left" if name in ("flood", "") else "right")
    for name, phases in result["floods"].items():
        alone = phases["alone"]["p95_ms"]
        for phase, row in phases.items():
            table.add_row(
                name if phase == "alone" else "",
                phase,
                f"{row['p50_ms']:,.0f}",
                f"{row['p95_ms']:,.0f}",
                f"{row['p95_ms'] / alone:.2f}",
                f"{row['flooder_per_second']:.2f}",
                end_section=phase == PHASES[-1],
            )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the three phases")
    parser.add_argument("--seconds", type=float, default=7.0, help="length of one phase")
    parser.add_argument("--flood", choices=[*FLOODS], action="append", help="which floods; default: chat")
    given = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("HEARTH_")]:
        del os.environ[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    console, before, speed = Console(), machine(), Speed()
    chosen = given.flood or ["chat"]
    measured = {name: measure(FLOODS[name], speed, given.rounds, given.seconds) for name in chosen}
    floods = {name: asdict(FLOODS[name]) for name in chosen}
    result = {"machine": before, "engine": asdict(speed), "sent": floods, "rounds": given.rounds}
    result |= {"seconds": given.seconds, "floods": measured}
    show(result, console)
    console.print(f"Written to {write_result('fairness', result)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
