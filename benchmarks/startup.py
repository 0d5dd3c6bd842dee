"""`python -m benchmarks.startup`: from `hearth serve` to all models warm, what they take then, and at rest.

Starts a Hearth of its own in a fresh state folder (weights are reused), so nothing else should run meanwhile.
Exit status 1 when a budget is missed or a process is left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from rich.console import Console
from rich.table import Table

from benchmarks._measure import cpu_share, machine, processes_of, pss_bytes, write_result
from engine.cli import control
from engine.config import ROOT, Config, load
from engine.scheduler.status import Status

READY_BUDGET_S = 150.0
MEMORY_BUDGET_BYTES = 12 * 1024**3
IDLE_BUDGET_CORES = 0.10
_STOP_S = 90.0
_LOOK_S = 0.5
#: A look at weights that are there already takes no longer than this on a busy machine.
_CHECK_S = 5.0


@dataclass
class Timeline:
    """When each model was first seen in which state, seconds from the start of the process."""

    seen: dict[str, dict[str, float]] = field(default_factory=dict)

    def note(self, status: Status, at: float) -> None:
        for model in status.models:
            self.seen.setdefault(model.id, {}).setdefault(model.state, round(at, 1))

    def spent(self, model: str, state: str) -> float:
        """Seconds from the state's first sight to the next state's."""
        times = sorted(self.seen[model].values())
        began = self.seen[model].get(state)
        return 0.0 if began is None else next((t for t in times if t > began), began) - began


class Serving:
    """A `hearth serve` of this benchmark."""

    def __init__(self, config: Config, process: subprocess.Popen[bytes], log: Path) -> None:
        self.config = config
        self.process = process
        self.log = log
        self.began = time.monotonic()
        self.timeline = Timeline()

    def status(self) -> Status | None:
        """None while it does not answer yet."""
        try:
            return asyncio.run(control.status(self.config))
        except control.NotRunningError:
            return None

    def wait_ready(self, limit_s: float) -> tuple[float, Status]:
        """Seconds until `/ready` answers 200, and the status then."""
        while (spent := time.monotonic() - self.began) < limit_s:
            if self.process.poll() is not None:
                raise SystemExit(f"hearth serve ended ({self.process.returncode}):\n{self._tail()}")
            status = self.status()
            if status is not None:
                self.timeline.note(status, spent)
                if status.ready and _answers(status.base_url.removesuffix("/v1") + "/ready"):
                    return time.monotonic() - self.began, status
            time.sleep(_LOOK_S)
        raise SystemExit(f"not ready after {limit_s:.0f} s:\n{self._tail()}")

    def stop(self) -> float:
        """Stops it as Ctrl-C does; seconds that took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(_STOP_S)
        return time.monotonic() - began

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


@contextmanager
def serving(weights: Path, profile: str, file: Path | None) -> Iterator[Serving]:
    """A fresh Hearth; whatever happens, it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-") as folder:
        state_dir = Path(folder)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")}
        os.environ.clear()
        os.environ.update(clean, HEARTH_WEIGHTS__DIR=str(weights.resolve()), HEARTH_API_KEY="benchmark-key-1")
        config = load(file, state_dir=state_dir, profile=profile, port=0)
        command = [sys.executable, "-m", "engine.cli", "serve", "--port", "0", "--plain"]
        command += ["--state-dir", folder, "--profile", profile]
        command += ["--config", str(file.resolve())] if file else []
        log = state_dir / "serve.txt"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield Serving(config, process, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            asyncio.run(control.stop(config, drain=False))


def measure(
    weights: Path, profile: str, file: Path | None, *, limit_s: float, rest_s: float, idle_s: float
) -> dict[str, Any]:
    """One whole run."""
    before = machine()
    with serving(weights, profile, file) as hearth:
        ready_s, status = hearth.wait_ready(limit_s)
        replicas = {r.id: r.pid for model in status.models for r in model.replicas if r.pid}
        gateways = {unit.id: unit.pid for unit in status.gateways if unit.pid}
        leaders = {"scheduler": hearth.process.pid, **gateways, **replicas}
        time.sleep(rest_s)
        parts = {name: pss_bytes(p.pid for p in processes_of([pid])) for name, pid in leaders.items()}
        everything = [process.pid for process in processes_of(leaders.values())]
        idle = cpu_share(everything, idle_s)
        stop_s = hearth.stop()
        left = [f"{p.pid} {p.name()}" for p in processes_of(leaders.values())]
    return {
        "machine": before,
        "profile": profile,
        "ready_s": round(ready_s, 1),
        "models": {
            model.id: {
                "category": model.category,
                "ready_s": hearth.timeline.seen[model.id].get("ready"),
                "preparing_s": round(hearth.timeline.spent(model.id, "preparing"), 1),
                "pss_bytes": sum(parts[r.id] for r in model.replicas if r.id in parts),
            }
            for model in status.models
        },
        "gateway_pss_bytes": sum(parts[name] for name in gateways),
        "scheduler_pss_bytes": parts["scheduler"],
        "pss_bytes": sum(parts.values()),
        "processes": len(everything),
        "idle_cores": round(idle, 4),
        "idle_over_s": idle_s,
        "stop_s": round(stop_s, 1),
        "left": left,
    }


def missed(result: dict[str, Any]) -> list[str]:
    """What of the budgets is not kept, in words; empty when all is well."""
    found = []
    if result["ready_s"] > READY_BUDGET_S:
        found.append(f"ready after {result['ready_s']:.0f} s; the budget is {READY_BUDGET_S:.0f} s")
    if result["pss_bytes"] > MEMORY_BUDGET_BYTES:
        found.append(f"{_gib(result['pss_bytes'])} of memory; the budget is {_gib(MEMORY_BUDGET_BYTES)}")
    if result["idle_cores"] > IDLE_BUDGET_CORES:
        found.append(f"{result['idle_cores']:.1%} of a core at rest; the budget is {IDLE_BUDGET_CORES:.0%}")
    if result["left"]:
        found.append(f"left running after the stop: {', '.join(result['left'])}")
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """The result for a person."""
    table = Table(title=f"Start of profile '{result['profile']}' on {result['machine']['cores']} cores")
    for name in ("", "ready, s", "memory (PSS)"):
        table.add_column(name, justify="left" if not name else "right")
    for model, row in result["models"].items():
        table.add_row(f"{model} ({row['category']})", f"{row['ready_s']:.1f}", _gib(row["pss_bytes"]))
    table.add_row("gateway", "", _gib(result["gateway_pss_bytes"]))
    table.add_row("scheduler", "", _gib(result["scheduler_pss_bytes"]), end_section=True)
    table.add_row("everything", f"{result['ready_s']:.1f}", _gib(result["pss_bytes"]))
    table.add_row("budget", f"{READY_BUDGET_S:.0f}", _gib(MEMORY_BUDGET_BYTES))
    console.print(table)
    console.print(
        f"At rest: {result['idle_cores']:.1%} of one core (budget {IDLE_BUDGET_CORES:.0%}) over "
        f"{result['idle_over_s']:.0f} s. Stop: {result['stop_s']:.1f} s. Processes: {result['processes']}."
    )


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--weights", type=Path, default=ROOT / "var" / "weights", help="prepared weights")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--config", type=Path, help="configuration file; default: hearth.toml, if any")
    parser.add_argument("--limit", type=float, default=900.0, help="longest wait for ready, seconds")
    parser.add_argument("--rest", type=float, default=10.0, help="rest before the idle measure, seconds")
    parser.add_argument("--idle", type=float, default=30.0, help="length of the idle measure, seconds")
    given = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    limits = {"limit_s": given.limit, "rest_s": given.rest, "idle_s": given.idle}
    result = measure(given.weights, given.profile, given.config, **limits)
    show(result, console)
    console.print(f"Written to {write_result('startup', result)}.")
    if any(row["preparing_s"] > _CHECK_S for row in result["models"].values()):
        console.print("Some weights were prepared in this run; run again for the time after installation.")
    faults = missed(result)
    for fault in faults:
        console.print(f"Missed: {fault}.", style="red")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
