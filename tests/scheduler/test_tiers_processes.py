"""Warm tiers over real processes: fake runners that sleep and wake over HTTP, and that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.config import Config
from engine.routes import RouteTable
from engine.scheduler.leftovers import end_strays
from engine.scheduler.probe import BusyError, HttpProber, ProbeError
from engine.scheduler.service import Scheduler
from engine.scheduler.statefile import load
from engine.scheduler.status import Status

from .support import GIB, nap_config, napper
from .test_processes import make, model, ours, serve, until

NAMES = ("nap-a", "nap-b")


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """Two models that sleep, with room for one of them; at the end nothing may live."""
    made = nap_config(tmp_path, *NAMES)
    yield made
    left = ours(made)
    end_strays(made, [])
    assert not left, f"left running: {left}"


@contextlib.asynccontextmanager
async def running(settings: Config, **options: str) -> AsyncIterator[Scheduler]:
    scheduler = make(settings, *(napper(name, options=options) for name in NAMES))
    task = asyncio.create_task(scheduler.run())
    try:
        yield scheduler
    finally:
        scheduler.request_stop()
        await asyncio.wait_for(task, 20)


async def asleep(scheduler: Scheduler, count: int = 2) -> Status:
    return await until(scheduler, lambda status: status.ready and status.asleep == count)


async def wake(settings: Config, name: str, within_s: float = 20.0) -> tuple[int, dict[str, Any]]:
    connector = aiohttp.UnixConnector(str(settings.control_socket))
    timeout = aiohttp.ClientTimeout(total=within_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        body = {"model": name, "worker": os.getpid()}
        async with session.post("http://hearth/wake", json=body) as answer:
            return answer.status, await answer.json()


def socket_of(settings: Config, name: str) -> Path:
    return settings.runtime_dir / f"{name}-0.sock"


async def sleeps(settings: Config, name: str) -> bool:
    return await HttpProber().is_sleeping(socket_of(settings, name), 5)


async def test_models_sleep_wake_for_a_request_and_make_room_for_each_other(settings: Config) -> None:
    async with running(settings) as scheduler:
        status = await asleep(scheduler)
        assert model(status, "nap-a").reason == "asleep; the first request wakes it"
        assert [one.tier for one in status.models] == ["standby"] * 2
        assert await sleeps(settings, "nap-a") and await sleeps(settings, "nap-b")
        table = RouteTable.model_validate_json(settings.routes_file.read_bytes())
        assert [(row.state, row.tier, row.replicas) for row in table.models] == [
            ("asleep", "standby", [])
        ] * 2
        assert all(row.wake_wait_s == settings.tiers.wake_wait_s and row.eta_s for row in table.models)
        for this, other in (NAMES, NAMES[::-1], NAMES):
            assert await wake(settings, this) == (200, {"state": "ready"})
            status = scheduler.status()
            assert (model(status, this).state, model(status, other).state) == ("ready", "asleep")
            assert not await sleeps(settings, this) and await sleeps(settings, other)
            (device,) = [one for one in status.devices if one.device == "cpu:0"]
            assert 2 * GIB < device.held_bytes <= device.room_bytes
        assert all(one.restarts == 0 for one in status.models)
        assert load(settings.state_file).wakes.keys() == set(NAMES)


async def test_a_call_for_what_cannot_be_woken_is_refused(tmp_path: Path) -> None:
    settings = nap_config(tmp_path)
    async with running(settings.model_copy(update={"tiers": Config().tiers})) as scheduler:
        await until(scheduler, lambda status: status.ready)
        assert await wake(settings, "nap-a") == (200, {"state": "ready"})
        status, body = await wake(settings, "nap-z")
        assert status == 404 and "nap-z" in body["error"]["message"]
        os.kill(model(scheduler.status(), "nap-a").pid or 0, signal.SIGKILL)
        await until(scheduler, lambda status: model(status, "nap-a").state != "ready")
        status, body = await wake(settings, "nap-a")
        assert status == 409 and "resident" in body["error"]["message"]


async def test_one_that_is_in_use_stays_and_a_caller_that_leaves_is_forgotten(
    settings: Config, tmp_path: Path
) -> None:
    busy = tmp_path / "busy"
    async with running(settings, busy_file=str(busy)) as scheduler:
        await asleep(scheduler)
        assert (await wake(settings, "nap-a"))[0] == 200
        busy.touch()
        call = asyncio.create_task(wake(settings, "nap-b"))
        await until(scheduler, lambda status: "until there is room" in model(status, "nap-b").reason)
        # Its own answer 409 puts it back, again and again.
        await until(scheduler, lambda status: model(status, "nap-a").state == "draining")
        await until(scheduler, lambda status: model(status, "nap-a").state == "ready")
        call.cancel()
        await until(scheduler, lambda status: "the first request" in model(status, "nap-b").reason)
        busy.unlink()
        await asyncio.sleep(0.3)
        assert model(scheduler.status(), "nap-a").state == "ready", "nobody asks for its room any more"
        assert (await wake(settings, "nap-b"))[0] == 200


async def test_a_killed_sleeper_comes_back_and_falls_asleep(settings: Config) -> None:
    async with running(settings) as scheduler:
        first = model(await asleep(scheduler), "nap-a")
        assert (await wake(settings, "nap-b"))[0] == 200
        os.kill(first.pid or 0, signal.SIGKILL)
        await until(scheduler, lambda status: model(status, "nap-a").pid not in (None, first.pid))
        status = await asleep(scheduler)
        assert (model(status, "nap-a").restarts, model(status, "nap-b").restarts) == (1, 0)
        assert (await wake(settings, "nap-a"))[0] == 200


async def test_a_wake_that_hangs_ends_in_a_restart_that_serves(settings: Config, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    hasty = settings.model_copy(update={"tiers": settings.tiers.model_copy(update={"wake_timeout_s": 0.3})})
    async with running(hasty, slow_file=str(slow)) as scheduler:
        first = model(await asleep(scheduler), "nap-a")
        slow.touch()
        call = asyncio.create_task(wake(hasty, "nap-a"))
        failed = await until(scheduler, lambda status: model(status, "nap-a").state in ("failed", "backoff"))
        assert "wake_timeout_s" in model(failed, "nap-a").reason
        assert (await call)[0] == 200
        assert model(scheduler.status(), "nap-a").pid != first.pid


async def test_a_killed_scheduler_leaves_sleepers_to_the_next(tmp_path: Path, settings: Config) -> None:
    process = serve(tmp_path, *NAMES)
    slow = tmp_path / "slow"
    try:
        await states(settings, "asleep", "asleep")
        slow.touch()
        with contextlib.suppress(TimeoutError):
            await wake(settings, "nap-b", within_s=1.0)
        await states(settings, "asleep", "moving")
    finally:
        process.kill()
        process.wait()
    pids = {unit.id: unit.pid for unit in load(settings.state_file).units if unit.kind == "runner"}
    async with running(settings, slow_file=str(slow)) as scheduler:
        status = await until(scheduler, lambda status: model(status, "nap-a").state == "asleep")
        slow.unlink()
        status = await until(scheduler, lambda status: status.ready)
        assert {f"{one.id}-0": one.pid for one in status.models} == pids
        assert await sleeps(settings, "nap-a")
        assert (await wake(settings, "nap-a"))[0] == 200
        assert await sleeps(settings, "nap-b")


async def states(settings: Config, *wanted: str) -> None:
    """Waits until the state file tells of the runners in these states."""
    async with asyncio.timeout(20):
        while True:
            runners = [unit.state for unit in load(settings.state_file).units if unit.kind == "runner"]
            if runners == list(wanted):
                return
            await asyncio.sleep(0.02)


async def test_the_questions_of_sleeping_say_what_went_wrong(settings: Config, tmp_path: Path) -> None:
    busy, prober = tmp_path / "busy", HttpProber()
    async with running(settings, busy_file=str(busy)) as scheduler:
        await asleep(scheduler)
        assert (await wake(settings, "nap-a"))[0] == 200
        busy.touch()
        with pytest.raises(BusyError, match="in hand"):
            await prober.sleep(socket_of(settings, "nap-a"), 5)
        with pytest.raises(ProbeError, match="failed"):
            await prober.sleep(tmp_path / "none", 5)
        with pytest.raises(ProbeError, match="failed"):
            await prober.is_sleeping(tmp_path / "none", 5)
