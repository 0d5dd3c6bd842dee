"""Isolation of what a tenant owns, over real processes: scheduler, gateway, runners that say who answered.

Tenant A owns one replica, tenant B floods the same model with many more connections than its shared replica
works on at once; then A's replica is killed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.config import Config
from engine.metering import keys, tenants
from engine.metering.opening import opened
from engine.scheduler.commands import Commands
from engine.scheduler.leftovers import end_strays
from engine.scheduler.probe import HttpProber
from engine.scheduler.service import Scheduler
from engine.scheduler.status import ModelStatus, Status
from engine.scheduler.units import GatewayPlan

from .support import FakeCommands, catalog, config, entry, profile
from .test_processes import ours, until

SHARED, OWNED = "m-0", "m@acme-0"
#: Connections of the flood; the fake works on 4 requests together.
FLOOD, WORKS_ON = 48, 4
WORK_S = 0.02


@pytest.fixture
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """A configuration in which acme owns a replica; at the end nothing may live."""
    made = config(
        tmp_path,
        dedicated={"acme": {"models": {"m": 1}, "spill_over": request.param}},
        models={"m": {"max_batch": WORKS_ON}},
        # Long enough an outage that many requests fall into it.
        scheduler={"backoff_first_s": 1.0, "backoff_max_s": 1.0},
        gateway={"access_log": False},
        log_level="error",
    )
    yield made
    left = ours(made)
    end_strays(made, [])
    assert not left, f"left running: {left}"


class RealGateway(FakeCommands):
    """Fake runners behind a real gateway."""

    def gateway_argv(self, plan: GatewayPlan, listener: int) -> list[str]:
        return Commands.gateway_argv(self, plan, listener)


@contextlib.asynccontextmanager
async def serving(settings: Config) -> AsyncIterator[Scheduler]:
    known = catalog(entry("m", options={"work_s": WORK_S}))
    commands, prober = RealGateway(settings), HttpProber(health_timeout_s=5.0)
    scheduler = Scheduler(settings, profile("m"), known, commands=commands, prober=prober)
    task = asyncio.create_task(scheduler.run())
    try:
        yield scheduler
    finally:
        scheduler.request_stop()
        await asyncio.wait_for(task, 20)


async def keys_of(settings: Config, *names: str) -> list[str]:
    async with opened(settings) as database:
        made = []
        for name in names:
            await tenants.create(database, name)
            key, _ = await keys.create(database, name=name, tenant=name)
            made.append(key)
        return made


@dataclass
class Answer:
    """What one request got."""

    at: float
    status: int
    replica: str
    code: str
    retry_after: str
    message: str


@dataclass
class Caller:
    """A tenant's clients: each sends its next request as soon as the last is answered."""

    name: str
    key: str
    url: str
    pause_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, http: aiohttp.ClientSession, connections: int) -> None:
        self.tasks = [asyncio.create_task(self._call(http, number)) for number in range(connections)]

    async def _call(self, http: aiohttp.ClientSession, number: int) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        for count in range(1_000_000):
            headers = {"authorization": f"Bearer {self.key}", "x-request-id": f"{self.name}-{number}-{count}"}
            async with http.post(self.url, json=body, headers=headers) as answer:
                said = await answer.json()
                error = said.get("error", {})
                self.answers.append(
                    Answer(
                        time.monotonic(),
                        answer.status,
                        answer.headers.get("x-replica", ""),
                        error.get("code", ""),
                        answer.headers.get("retry-after", ""),
                        error.get("message", ""),
                    )
                )
            await asyncio.sleep(self.pause_s)

    async def more(self, count: int, seconds: float = 10.0) -> list[Answer]:
        """The next answers, so many of them."""
        since = len(self.answers)
        await self.until(lambda: len(self.answers) >= since + count, seconds)
        return self.answers[since:]

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                for task in self.tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def replicas(self) -> set[str]:
        return {answer.replica for answer in self.answers if answer.status == 200}


def row(status: Status, owner: str) -> ModelStatus:
    return next(one for one in status.models if one.owner == owner)


async def seen_by(settings: Config, unit: str) -> collections.Counter[str]:
    """How many requests of each caller a replica was sent, by its own count."""
    connector = aiohttp.UnixConnector(str(settings.runtime_dir / f"{unit}.sock"))
    session = aiohttp.ClientSession(connector=connector)
    async with session, session.get("http://runner/seen") as answer:
        return collections.Counter(await answer.json())


@contextlib.asynccontextmanager
async def flooded(settings: Config) -> AsyncIterator[tuple[Scheduler, Caller, Caller]]:
    """All is warm, B floods, and A calls now and then."""
    key_a, key_b = await keys_of(settings, "acme", "flooder")
    async with serving(settings) as scheduler:
        status = await until(scheduler, lambda status: status.ready)
        url = f"{status.base_url}/chat/completions"
        a, b = Caller("a", key_a, url, pause_s=0.01), Caller("b", key_b, url)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            b.start(http, FLOOD)
            await b.more(FLOOD)
            a.start(http, 2)
            try:
                yield scheduler, a, b
            finally:
                await a.stop()
                await b.stop()


async def kill_the_owned(scheduler: Scheduler) -> int:
    pid = row(scheduler.status(), "acme").pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    return pid


async def back(scheduler: Scheduler, killed: int) -> None:
    def is_back(status: Status) -> bool:
        own = row(status, "acme")
        return own.state == "ready" and own.pid != killed

    await until(scheduler, is_back, 15)


@pytest.mark.parametrize("settings", [False], indirect=True, ids=["alone"])
async def test_a_flood_and_a_dead_replica_never_mix_tenants(settings: Config) -> None:
    async with asyncio.timeout(50), flooded(settings) as (scheduler, a, b):
        calm = await a.more(40)
        assert {(one.status, one.replica) for one in calm} == {(200, OWNED)}
        before = await seen_by(settings, OWNED)
        assert before["a"] >= 40 and before["b"] == 0

        killed = await kill_the_owned(scheduler)
        await a.until(lambda: any(one.status != 200 for one in a.answers))
        during = await a.more(30)
        assert row(scheduler.status(), "acme").state != "ready", "the outage was too short to be seen"
        refused = [one for one in [*calm, *during] if one.status != 200]
        assert len(refused) >= 25
        for one in refused:
            assert one.status == 503 and one.code in ("model_not_ready", "runner_lost"), one
            assert int(one.retry_after) >= 1
        told = [one.message for one in refused if one.code == "model_not_ready"]
        assert told and all("dedicated to 'acme'" in message for message in told)
        undisturbed = await b.more(2 * FLOOD)
        assert {(one.status, one.replica) for one in undisturbed} == {(200, SHARED)}

        await back(scheduler, killed)
        await a.until(lambda: a.answers[-1].status == 200)
        await a.more(20)
        assert {one.status for one in a.answers[-10:]} == {200}
        await b.more(FLOOD)

        assert a.replicas() == {OWNED}
        assert {(one.status, one.replica) for one in b.answers} == {(200, SHARED)}
        assert (await seen_by(settings, SHARED))["a"] == 0
        assert (await seen_by(settings, OWNED))["b"] == 0


@pytest.mark.parametrize("settings", [True], indirect=True, ids=["spilling"])
async def test_with_spill_over_the_shared_ones_serve_meanwhile_and_never_the_other_way(
    settings: Config,
) -> None:
    async with asyncio.timeout(50), flooded(settings) as (scheduler, a, b):
        calm = await a.more(40)
        assert {(one.status, one.replica) for one in calm} == {(200, OWNED)}
        assert (await seen_by(settings, OWNED))["b"] == 0

        killed = await kill_the_owned(scheduler)
        await a.until(lambda: SHARED in a.replicas())
        meanwhile = await a.more(5)
        assert {(one.status, one.replica) for one in meanwhile} == {(200, SHARED)}
        # Only what was in the killed one's hands may be lost, and says so.
        lost = [one for one in a.answers if one.status != 200]
        assert len(lost) <= 2 and all((one.status, one.code) == (503, "runner_lost") for one in lost)

        await back(scheduler, killed)
        # What was sent to the shared one before may be answered after the first that its own has answered.
        await a.until(lambda: {one.replica for one in a.answers[-20:]} == {OWNED})
        again = await a.more(20)
        assert {(one.status, one.replica) for one in again} == {(200, OWNED)}
        await b.more(FLOOD)
        assert {(one.status, one.replica) for one in b.answers} == {(200, SHARED)}
        assert (await seen_by(settings, OWNED))["b"] == 0
