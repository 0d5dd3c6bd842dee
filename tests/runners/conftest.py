"""Starts a runner as the scheduler does: its own process group, a specification file, a Unix socket."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from engine.runners import scratch
from engine.runners.spec import RunnerSpec
from engine.runners.vllm_server import weights_bytes
from models.catalog import load_catalog
from models.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Started:
    """A runner process under test."""

    process: subprocess.Popen[str]
    socket: Path
    log: Path

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession("http://runner", connector=aiohttp.UnixConnector(str(self.socket)))

    async def health(self) -> int:
        async with self.session() as session, session.get("/health") as answer:
            return answer.status

    async def sleeps_and_wakes(self, weights: Path) -> None:
        """Puts it to sleep and wakes it; asleep it holds less, by a quarter of its weight files at least.

        Weights of 16 bits take twice their file's size in memory; of a mapped file only what was used is in.
        """
        size = await asyncio.to_thread(weights_bytes, weights)
        awake = psutil.Process(self.process.pid).memory_full_info().pss
        status, _, _ = await self.post("/sleep", b"")
        assert status == 200, self.log.read_text()
        assert await self.health() == 200
        asleep = psutil.Process(self.process.pid).memory_full_info().pss
        assert awake - asleep >= size / 4, (awake, asleep, size)
        status, _, _ = await self.post("/wake_up", b"")
        assert status == 200, self.log.read_text()

    async def ready(self, deadline_s: float = 60) -> None:
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            assert self.process.poll() is None, f"the runner left early:\n{self.log.read_text()}"
            try:
                if await self.health() == 200:
                    return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.02)
        raise AssertionError(f"not ready after {deadline_s} s:\n{self.log.read_text()}")

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any, Any]:
        """Status, decoded body, headers."""
        kind = {"data": body} if isinstance(body, bytes | aiohttp.FormData) else {"json": body}
        async with self.session() as session, session.post(path, **kind, **options) as answer:
            return answer.status, await answer.json(), answer.headers


StartRunner = Callable[..., Started]


@pytest.fixture
def start_runner(tmp_path: Path) -> Iterator[StartRunner]:
    """``start_runner(module, **spec)``; whatever it starts is gone after the test, with its process group."""
    processes: list[subprocess.Popen[str]] = []
    # A Unix socket's path may have 107 bytes at most: pytest's own folders can be longer.
    with tempfile.TemporaryDirectory(prefix="hr") as short:

        def start(module: str, **over: Any) -> Started:
            number = len(processes)
            socket = Path(short) / f"{number}.sock"
            facts = {
                "model": "dummy",
                "category": "embedding",
                "engine": "sentence-transformers",
                "model_dir": tmp_path,
                "socket": socket,
                "drain_s": 5,
            }
            spec = tmp_path / f"spec{number}.json"
            spec.write_text(RunnerSpec.model_validate(facts | over).model_dump_json())
            log = tmp_path / f"runner{number}.log"
            with log.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", module, "--spec", str(spec)],
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
            processes.append(process)
            return Started(process, socket, log)

        yield start
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        scratch.clear_shared(Path(short))


@pytest.fixture(scope="session")
def weights() -> Callable[[str], Path]:
    """``weights(model)``: the prepared folder of a catalog model, made on first use."""

    def prepared(model: str) -> Path:
        folder = Path(os.environ.get("HEARTH_WEIGHTS__DIR", ROOT / "var" / "weights"))
        return prepare(load_catalog().find(model), folder, offline=False, report=lambda _: None)

    return prepared
