"""`python -m benchmarks.sleep`: what the runners that are not vLLM give back asleep, and how fast they wake.

Each is started alone with its real weights, answers twice, and goes through some sleeps. Memory is the
proportional set size of its process. Exit status 1 when an answer after a sleep differs from that before.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._measure import machine, pss_bytes, write_result
from engine.config import ROOT
from engine.runners.spec import RUNNER_MODULES, RunnerSpec
from models.catalog import load_catalog
from models.prepare import prepare

MIB = 2**20
_READY_S = 180.0


@dataclass(frozen=True)
class Asked:
    """A model, a request for it, and the answer without what differs each time (ids, dates)."""

    model: str
    path: str
    request: dict[str, Any]
    essence: Callable[[Any], Any]


def _asked(assets: Path) -> list[Asked]:
    sound = (ROOT / "tests" / "data" / "jfk.flac").read_bytes()
    picture = base64.b64encode((assets / "bus.jpg").read_bytes()).decode()
    texts = [f"{word} number {n}" for n in range(16) for word in ("cat", "stone", "harbour", "symphony")]
    return [
        Asked(
            "all-minilm-l6-v2",
            "/v1/embeddings",
            {"json": {"input": texts}},
            lambda body: np.array([row["embedding"] for row in body["data"]]).round(5).tolist(),
        ),
        Asked(
            "tiny-image",
            "/v1/images/generations",
            {"json": {"prompt": "a red circle on a blue background", "seed": 1, "size": "64x64"}},
            lambda body: body["data"],
        ),
        Asked(
            "whisper-tiny-en",
            "/v1/audio/transcriptions",
            {"files": {"file": ("clip.flac", sound)}},
            lambda body: body["text"],
        ),
        Asked(
            "yolov8s-world",
            "/v1/detections",
            {"json": {"image": f"data:image/jpeg;base64,{picture}"}},
            lambda body: body["data"],
        ),
    ]


class Runner:
    """One runner process of this benchmark."""

    def __init__(self, asked: Asked, folder: Path) -> None:
        entry = load_catalog().find(asked.model)
        weights = prepare(entry, ROOT / "var" / "weights", offline=False, report=lambda _: None)
        spec = RunnerSpec(
            model=entry.id,
            category=entry.category,
            engine=entry.engine,
            capabilities=list(entry.capabilities),
            model_dir=weights,
            socket=folder / "runner.sock",
            context_length=entry.context_length,
            can_sleep=True,
            options=entry.options,
        )
        file = folder / "spec.json"
        file.write_text(spec.model_dump_json())
        self.engine = entry.engine
        self._asked = asked
        self._log = (folder / "runner.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", RUNNER_MODULES[entry.engine], "--spec", str(file)],
            cwd=ROOT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._http = httpx.Client(
            base_url="http://runner", transport=httpx.HTTPTransport(uds=str(spec.socket)), timeout=120
        )

    def wait_ready(self) -> None:
        until = time.monotonic() + _READY_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if self._http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        self._log.seek(0)
        raise SystemExit(f"{self._asked.model} did not come up:\n{self._log.read()[-4000:]}")

    def answer(self) -> tuple[Any, float]:
        """The answer's essence and the seconds it took."""
        request = json.loads(json.dumps(self._asked.request)) if "json" in self._asked.request else None
        if request is not None:
            request["json"]["model"] = self._asked.model
        else:
            request = {**self._asked.request, "data": {"model": self._asked.model}}
        began = time.perf_counter()
        answer = self._http.post(self._asked.path, **request)
        seconds = time.perf_counter() - began
        if answer.status_code != 200:
            raise SystemExit(f"{self._asked.model}: {answer.status_code} {answer.text[:1000]}")
        return self._asked.essence(answer.json()), seconds

    def change(self, path: str) -> float:
        """Puts it to sleep or wakes it; seconds."""
        began = time.perf_counter()
        answer = self._http.post(path)
        seconds = time.perf_counter() - began
        if answer.status_code != 200:
            raise SystemExit(f"{self._asked.model}: POST {path}: {answer.status_code} {answer.text}")
        return seconds

    def memory_mib(self) -> float:
        return pss_bytes([self._process.pid]) / MIB

    def close(self) -> None:
        self._http.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


def measure(asked: Asked, rounds: int) -> dict[str, Any]:
    """Medians over the rounds; the first sleep, which looks for the weights' places, by itself."""
    with tempfile.TemporaryDirectory(prefix="hs") as folder:
        runner = Runner(asked, Path(folder))
        try:
            runner.wait_ready()
            runner.answer()
            before, warm = runner.answer()
            awake = runner.memory_mib()
            seen: list[tuple[float, ...]] = []
            same = True
            for _ in range(rounds):
                slept = runner.change("/sleep")
                asleep = runner.memory_mib()
                woke = runner.change("/wake_up")
                after, first = runner.answer()
                same = same and after == before
                seen.append((slept, asleep, woke, first, runner.memory_mib()))
        finally:
            runner.close()
    slept_s, asleep_mib, woke_s, first_s, again_mib = map(statistics.median, zip(*seen, strict=True))
    return {
        "runner": runner.engine,
        "model": asked.model,
        "awake_mib": round(awake, 1),
        "asleep_mib": round(asleep_mib, 1),
        "awake_again_mib": round(again_mib, 1),
        "first_sleep_s": round(seen[0][0], 3),
        "sleep_s": round(slept_s, 3),
        "wake_s": round(woke_s, 3),
        "first_answer_s": round(first_s, 3),
        "warm_answer_s": round(warm, 3),
        "same_answer": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="sleeps of each runner")
    parser.add_argument("--models", nargs="*", help="only these")
    options = parser.parse_args()
    found = find_spec("ultralytics")  # its pictures only: the library itself stays in its runner
    if found is None or found.origin is None:
        raise SystemExit("ultralytics is not installed; `make setup` installs it.")
    assets = Path(found.origin).parent / "assets"
    rows = [
        measure(asked, options.rounds)
        for asked in _asked(assets)
        if not options.models or asked.model in options.models
    ]
    table = Table("", *(row["model"] for row in rows))
    for fact in rows[0]:
        table.add_row(fact, *(str(row[fact]) for row in rows))
    Console().print(table)
    if not options.models:
        print(f"written to {write_result('sleep', {'machine': machine(), 'runners': rows})}")
    if not all(row["same_answer"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
