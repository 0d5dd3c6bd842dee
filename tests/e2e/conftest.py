"""One serving Hearth for all end-to-end tests: `hearth serve` as a user starts it, the real seven engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from engine.config import Config
from engine.runners import scratch

ROOT = Path(__file__).resolve().parents[2]
KEY = "hearth-test-key-of-the-end-to-end-suite"
#: First start on a bare machine: fetching and converting the weights is in it.
START_S = 900.0


@dataclass
class Hearth:
    """A running `hearth serve` with its own state folder."""

    state_dir: Path
    process: subprocess.Popen[bytes]
    output: Path

    def command(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs another `hearth` command on the same state folder."""
        words = [sys.executable, "-m", "engine.cli", *args, "--state-dir", str(self.state_dir)]
        return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=check)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.command("status", "--json", check=False).stdout or "{}")
        return found

    @property
    def base_url(self) -> str:
        return str(self.status()["base_url"])

    def wait_ready(self, seconds: float) -> dict[str, Any]:
        """Waits until every model is warm; the status then."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                pytest.fail(
                    f"hearth serve ended ({self.process.returncode}):\n{self.output.read_text()[-4000:]}"
                )
            status = self.status()
            if status.get("ready"):
                return status
            time.sleep(1)
        pytest.fail(f"not ready after {seconds:.0f} s:\n{json.dumps(self.status(), indent=1)[-6000:]}")

    def groups(self) -> set[int]:
        """The process groups of everything that runs, the scheduler's own left out."""
        status = self.status()
        units = [*status["gateways"], *(r for m in status["models"] for r in m["replicas"])]
        return {os.getpgid(unit["pid"]) for unit in units if unit["pid"]}


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")}
    weights = os.environ.get("HEARTH_WEIGHTS__DIR", str(ROOT / "var" / "weights"))
    return clean | {
        "HEARTH_API_KEY": KEY,
        "HEARTH_WEIGHTS__DIR": weights,
        "HEARTH_FETCH__ALLOW_PRIVATE": "true",
        "HF_HUB_OFFLINE": "1",
    }


def start(state_dir: Path, *args: str) -> Hearth:
    """`hearth serve` on a free port."""
    output = state_dir / f"serve-{time.monotonic_ns()}.txt"
    state_dir.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "engine.cli", "serve", "--port", "0", "--state-dir", str(state_dir), *args]
    with output.open("wb") as sink:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Hearth(state_dir, process, output)


def members(groups: set[int]) -> list[psutil.Process]:
    """The living processes of these process groups."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def leavings(state_dir: Path) -> list[Path]:
    """Sockets and shared memory of a Hearth, which none may leave."""
    runtime = Config(state_dir=state_dir).runtime_dir
    shared = scratch.SHARED_MEMORY.glob(f"*{scratch.shm_scope(runtime)}*")
    return [path for path in (runtime, *shared) if path.exists()]


@pytest.fixture(scope="session")
def hearth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hearth]:
    """The shared server; stopped as a user stops it, and then nothing of it may be left."""
    running = start(tmp_path_factory.mktemp("hearth"))
    groups: set[int] = set()
    try:
        running.wait_ready(START_S)
        groups = running.groups()
        yield running
        if running.process.poll() is None:
            groups |= running.groups()
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGINT)
        try:
            running.process.wait(90)
        except subprocess.TimeoutExpired:
            running.command("stop", "--now", check=False)
            running.process.kill()
            raise
    assert running.process.returncode == 0, running.output.read_text()[-3000:]
    assert not members(groups), "processes outlived Ctrl-C"
    assert not leavings(running.state_dir)


@pytest.fixture(scope="session")
def base_url(hearth: Hearth) -> str:
    return hearth.base_url


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here uses the real engines."""
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.engines)
