"""Starts, asks, puts to sleep and wakes runners for the GPU check, and takes the times."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import aiohttp

from benchmarks._gpu_report import Record, Turn
from engine.config import ROOT
from engine.runners import scratch
from engine.runners.environment import runner_environment, visible_devices
from engine.runners.spec import RUNNER_MODULES, RunnerSpec
from engine.scheduler.launcher import LocalLauncher, Order, describe_exit
from engine.scheduler.units import ProcessRef
from engine.scheduler.warmup import Ask

_LOOK_S = 0.05
_STOP_S = 30.0


class CheckError(Exception):
    """The check cannot go on; the message says what happened and where to look."""


@dataclass(frozen=True)
class Subject:
    """One runner to check: its spec with weights, what is asked of it, what was planned."""

    spec: RunnerSpec
    ask: Ask
    #: 'prepared' or 'dummy'.
    weights: str
    planned_bytes: int
    planned_asleep_bytes: int

    @property
    def name(self) -> str:
        return self.spec.model


@dataclass(frozen=True)
class Answer:
    """Seconds to its first byte, and what it said (a digest)."""

    first_s: float
    digest: str


class Stage(Protocol):
    """What measuring needs; tests hand in a fake."""

    async def start(self, subject: Subject) -> float: ...

    async def ask(self, subject: Subject) -> Answer: ...

    async def sleep(self, subject: Subject) -> float: ...

    async def wake(self, subject: Subject) -> float: ...

    async def used(self) -> int: ...


async def measure(stage: Stage, subjects: Sequence[Subject], *, rounds: int, steady: int) -> list[Record]:
    """Each is started, asked and put to sleep; then they take turns, one awake at a time.

    Args:
        stage: where they run.
        subjects: in the order of their starts.
        rounds: how often each wakes.
        steady: requests whose median is the steady state.
    """
    records, said = [], {}
    for subject in subjects:
        record, answers = await _first_day(stage, subject, steady)
        records.append(record)
        said[subject.name] = answers
    for _ in range(rounds):
        for subject, record in zip(subjects, records, strict=True):
            wake_s = await stage.wake(subject)
            answer = await stage.ask(subject)
            used = await stage.used()
            sleep_s = await stage.sleep(subject)
            record.turns.append(
                Turn(wake_s, answer.first_s, sleep_s, used, answer.digest in said[subject.name])
            )
    return records


async def _first_day(stage: Stage, subject: Subject, steady: int) -> tuple[Record, set[str]]:
    before = await stage.used()
    record = Record(subject.name, subject.weights, subject.planned_bytes, subject.planned_asleep_bytes)
    record.start_s = await stage.start(subject)
    cold = await stage.ask(subject)
    ready = await stage.ask(subject)
    later = [await stage.ask(subject) for _ in range(steady)]
    record.cold_first_s, record.ready_first_s = cold.first_s, ready.first_s
    record.steady_first_s = [answer.first_s for answer in later]
    record.used_bytes = await stage.used() - before
    record.first_sleep_s = await stage.sleep(subject)
    record.used_asleep_bytes = await stage.used() - before
    return record, {answer.digest for answer in (cold, ready, *later)}


class RunnerStage:
    """Real runners, each in its own process group; all are gone after the ``async with``."""

    def __init__(
        self,
        folder: Path,
        used: Callable[[Sequence[int]], int],
        *,
        limit_s: float,
        say: Callable[[str], None],
    ) -> None:
        """``used``: bytes in use, of the leaders' numbers; ``limit_s``: longest start or answer."""
        self._folder = folder
        self._used = used
        self._limit_s = limit_s
        self._say = say
        self._launcher = LocalLauncher(f"gpu-check-{os.getpid()}")
        self._refs: dict[str, ProcessRef] = {}
        self._sockets: list[Path] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ref in self._refs.values():
            self._launcher.terminate(ref)
        ends = [asyncio.ensure_future(self._launcher.exited(ref)) for ref in self._refs.values()]
        if ends:
            _, late = await asyncio.wait(ends, timeout=_STOP_S)
            for each in late:
                each.cancel()
        for ref in self._refs.values():
            await self._launcher.sweep(ref, at_once=True)
        for socket in self._sockets:
            scratch.clear(socket)
            socket.unlink(missing_ok=True)

    async def start(self, subject: Subject) -> float:
        """Seconds until its health check is answered with 200.

        Raises:
            CheckError: it ends or does not answer in time.
        """
        spec, name = subject.spec, subject.name
        self._say(f"Starting {name} ({subject.weights} weights) …")
        file, log = self._folder / f"{name}.json", self._folder / f"{name}.log"
        file.write_text(spec.model_dump_json())
        self._sockets.append(spec.socket)
        argv = [sys.executable, "-m", RUNNER_MODULES[spec.engine], "--spec", str(file)]
        environment = runner_environment(spec, os.environ)
        began = time.perf_counter()
        ref = self._refs[name] = self._launcher.launch(
            Order(name, argv, environment, ROOT, log, gpus=visible_devices(spec.device))
        )
        ended = asyncio.ensure_future(self._launcher.exited(ref))
        try:
            while not await self._healthy(spec.socket):
                if ended.done():
                    tail = "\n".join(self._launcher.log_tail(name))
                    raise CheckError(f"{name}: {describe_exit(ended.result())}. The end of its log:\n{tail}")
                if time.perf_counter() - began > self._limit_s:
                    raise CheckError(f"{name} has not loaded within {self._limit_s:.0f} s; see {log}")
                await asyncio.sleep(_LOOK_S)
        finally:
            ended.cancel()
        return time.perf_counter() - began

    async def _healthy(self, socket: Path) -> bool:
        try:
            return await self._call(socket, "GET", "/health") == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def ask(self, subject: Subject) -> Answer:
        """Sends the subject's request and reads the whole answer.

        Raises:
            CheckError: it is not right.
        """
        ask = subject.ask
        headers = {"content-type": ask.content_type}
        try:
            async with self._session(subject.spec.socket) as session:
                began = time.perf_counter()
                async with session.post(f"http://runner{ask.path}", data=ask.body, headers=headers) as answer:
                    body = await answer.content.readany()
                    first_s = time.perf_counter() - began
                    body += await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise CheckError(f"{subject.name} did not answer {ask.path}: {_told(error)}") from error
        fault = ask.fault(answer.status, body)
        if fault:
            shown = body[:300].decode(errors="replace")
            raise CheckError(f"{subject.name} answered {ask.path} wrongly: {fault}: {shown}")
        return Answer(first_s, _digest(body))

    async def sleep(self, subject: Subject) -> float:
        return await self._change(subject, "/sleep?level=1&mode=wait", "falling asleep")

    async def wake(self, subject: Subject) -> float:
        return await self._change(subject, "/wake_up", "waking up")

    async def _change(self, subject: Subject, path: str, what: str) -> float:
        began = time.perf_counter()
        try:
            status = await self._call(subject.spec.socket, "POST", path)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise CheckError(f"{subject.name}: {what} failed: {_told(error)}") from error
        if status != 200:
            raise CheckError(f"{subject.name}: {what} was answered with status {status}")
        return time.perf_counter() - began

    async def used(self) -> int:
        pids = [ref.pid for ref in self._refs.values()]
        return await asyncio.to_thread(self._used, pids)

    async def _call(self, socket: Path, method: str, path: str) -> int:
        async with (
            self._session(socket) as session,
            session.request(method, f"http://runner{path}") as answer,
        ):
            await answer.read()
            return answer.status

    def _session(self, socket: Path) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=self._limit_s)
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket)), timeout=timeout)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _digest(body: bytes) -> str:
    """Of what was said, without ids and times, which differ from answer to answer."""
    return hashlib.sha256(spoken(body)).hexdigest()[:16]


def spoken(body: bytes) -> bytes:
    """The words of a stream of chat events; any other body as it is."""
    if not body.startswith(b"data:"):
        return body
    words = []
    for line in body.split(b"\n"):
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                # A reasoning model's first words are in another field than its answer.
                delta = choice.get("delta", {})
                words += [delta.get(field) or "" for field in ("reasoning", "reasoning_content", "content")]
    return "".join(words).encode()
