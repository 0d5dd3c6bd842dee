"""The scheduler over real processes: a fake runner, gateway and preparation, quick to start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.config import ROOT, Config
from engine.routes import RouteTable
from engine.scheduler import groups
from engine.scheduler.leftovers import end_strays, scope_of
from engine.scheduler.probe import HttpProber
from engine.scheduler.service import Scheduler, SchedulerError, stop_leftovers
from engine.scheduler.statefile import StateFile, load
from engine.scheduler.status import ModelStatus, Status
from models.entry import ModelEntry

from .support import FakeCommands, catalog, config, entry, profile


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """A configuration; at the end nothing that was started under it may live."""
    made = config(tmp_path)
    yield made
    left = ours(made)
    end_strays(made, [])
    assert not left, f"left running: {left}"
    assert not made.runtime_dir.exists()


def ours(settings: Config) -> dict[int, str]:
    return groups.with_token(lambda token: token.startswith(scope_of(settings) + "/"))


def make(settings: Config, *entries: ModelEntry) -> Scheduler:
    names = [one.id for one in entries]
    commands, prober = FakeCommands(settings), HttpProber(health_timeout_s=2.0)
    return Scheduler(settings, profile(*names), catalog(*entries), commands=commands, prober=prober)


@contextlib.asynccontextmanager
async def running(settings: Config, *entries: ModelEntry) -> AsyncIterator[Scheduler]:
    scheduler = make(settings, *entries)
    task = asyncio.create_task(scheduler.run())
    try:
        yield scheduler
    finally:
        scheduler.request_stop()
        await asyncio.wait_for(task, 20)


async def until(scheduler: Scheduler, condition: Callable[[Status], Any], seconds: float = 20.0) -> Status:
    async with asyncio.timeout(seconds):
        async for status in scheduler.subscribe():
            if condition(status):
                return status
    raise AssertionError("the scheduler ended")


async def ready(scheduler: Scheduler) -> Status:
    return await until(scheduler, lambda status: status.ready)


def model(status: Status, name: str = "m") -> ModelStatus:
    return next(one for one in status.models if one.id == name)


def children(settings: Config, unit: str) -> set[int]:
    return {pid for pid, token in ours(settings).items() if token.split("/")[1] == unit}


async def test_seven_categories_become_ready_are_routed_and_stop(settings: Config) -> None:
    engines = {
        "chat": "vllm",
        "code": "vllm",
        "vision": "vllm",
        "image": "diffusers",
        "audio": "faster-whisper",
        "embedding": "sentence-transformers",
        "detection": "ultralytics",
    }
    entries = [entry(f"m-{c}", category=c, engine=e) for c, e in engines.items()]
    async with running(settings, *entries) as scheduler:
        status = await ready(scheduler)
        table = RouteTable.model_validate_json(settings.routes_file.read_bytes())
        assert [row.state for row in table.models] == ["ready"] * 7
        for row in table.models:
            assert stat.S_ISSOCK(os.stat(row.replicas[0].socket or "").st_mode)  # noqa: PTH116  no awaiting
        async with aiohttp.ClientSession() as session, session.get(status.base_url) as answer:
            assert int(await answer.text()) == status.gateways[0].pid
        assert settings.runtime_dir.stat().st_mode & 0o777 == 0o700
        assert settings.control_socket.stat().st_mode & 0o777 == 0o600
        assert await measured(scheduler) > 1_000_000
    table = RouteTable.model_validate_json(settings.routes_file.read_bytes())
    assert {(row.state, len(row.replicas)) for row in table.models} == {("stopped", 0)}


async def measured(scheduler: Scheduler) -> int:
    status = await until(scheduler, lambda s: all(m.memory_bytes for m in s.models))
    return min(one.memory_bytes or 0 for one in status.models)


async def test_a_killed_runner_comes_back_warm(settings: Config) -> None:
    async with running(settings, entry("m")) as scheduler:
        first = model(await ready(scheduler))
        assert first.pid
        os.kill(first.pid, signal.SIGKILL)
        away = model(await until(scheduler, lambda status: model(status).state in ("failed", "backoff")))
        assert "SIGKILL" in away.reason and away.eta_s
        again = model(await ready(scheduler))
        assert again.pid != first.pid and again.restarts == 1


async def test_children_of_a_killed_leader_end_before_the_next_start(settings: Config) -> None:
    async with running(settings, entry("m", options={"child": True})) as scheduler:
        first = model(await ready(scheduler))
        assert first.pid
        (child,) = children(settings, "m-0") - {first.pid}
        os.kill(first.pid, signal.SIGKILL)
        await until(scheduler, lambda status: model(status).pid not in (None, first.pid))
        assert child not in ours(settings)
        await ready(scheduler)


async def test_a_runner_that_ignores_sigterm_is_killed_with_its_child(settings: Config) -> None:
    scheduler = make(settings, entry("m", options={"child": True, "ignore_sigterm": True}))
    task = asyncio.create_task(scheduler.run())
    await ready(scheduler)
    assert len(children(settings, "m-0")) == 2
    began = time.monotonic()
    scheduler.request_stop()
    await asyncio.wait_for(task, 20)
    # drain_s and stop_timeout_s have half a second each.
    assert 0.9 < time.monotonic() - began < 5
    assert not ours(settings)


async def test_asked_twice_it_kills_at_once(tmp_path: Path) -> None:
    settings = config(tmp_path, scheduler={"stop_timeout_s": 60, "drain_s": 60})
    scheduler = make(settings, entry("m", options={"ignore_sigterm": True}))
    task = asyncio.create_task(scheduler.run())
    await ready(scheduler)
    scheduler.request_stop()
    await until(scheduler, lambda status: status.stopping)
    scheduler.request_stop(kill=True)
    await asyncio.wait_for(task, 5)
    assert not ours(settings) and not settings.runtime_dir.exists()


async def test_a_hung_runner_is_restarted(settings: Config, tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    quick = settings.model_copy(
        update={"scheduler": settings.scheduler.model_copy(update={"health_failures": 1})}
    )
    async with running(quick, entry("m", options={"hang_file": str(hang)})) as scheduler:
        first = model(await ready(scheduler))
        hang.touch()
        await until(scheduler, lambda status: model(status).state == "failed")
        hang.unlink()
        assert model(await ready(scheduler)).pid != first.pid


async def test_a_runner_that_cannot_start_says_why_in_the_status_alone(settings: Config) -> None:
    async with running(settings, entry("m", options={"exit": 3})) as scheduler:
        status = await until(scheduler, lambda status: model(status).restarts >= 2 and model(status).log_tail)
        assert "status 3: the fake has no weights" in model(status).reason
        row = RouteTable.model_validate_json(settings.routes_file.read_bytes()).models[0]
        assert "no weights" not in row.reason and not row.replicas


async def test_a_failed_preparation_is_told_and_tried_again(settings: Config) -> None:
    failing = settings.state_dir / "prepared" / "prepare-m.fail"
    failing.parent.mkdir(parents=True)
    failing.touch()
    async with running(settings, entry("m")) as scheduler:
        told = model(await until(scheduler, lambda status: model(status).state == "failed"))
        assert "no space left on the device; free 1 GiB" in told.reason
        failing.unlink()
        await ready(scheduler)


def serve(tmp_path: Path, *names: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.scheduler.serve_fakes", str(tmp_path), *names]
    return subprocess.Popen(argv, cwd=ROOT)


async def left_behind(tmp_path: Path, settings: Config, *names: str) -> StateFile:
    """Starts a scheduler in a process of its own, waits until all is ready, and kills it."""
    process = serve(tmp_path, *names)
    try:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(OSError, ValueError):
                    table = RouteTable.model_validate_json(settings.routes_file.read_bytes())
                    gateways = [u for u in load(settings.state_file).units if u.kind == "gateway"]
                    if all(row.state == "ready" for row in table.models) and gateways[0].state == "ready":
                        break
                await asyncio.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    return load(settings.state_file)


async def test_a_killed_scheduler_leaves_its_processes_to_the_next(tmp_path: Path, settings: Config) -> None:
    left = await left_behind(tmp_path, settings, "a", "b")
    pids = {unit.id: unit.pid for unit in left.units}
    version = RouteTable.model_validate_json(settings.routes_file.read_bytes()).version
    assert set(pids) == {"gateway-0", "a-0", "b-0"} and set(pids.values()) <= set(ours(settings))
    async with running(settings, entry("a"), entry("b")) as scheduler:
        status = await ready(scheduler)
        now = {
            unit.id: unit.pid for unit in (*status.gateways, *(r for m in status.models for r in m.replicas))
        }
        assert now == pids and status.base_url == f"http://127.0.0.1:{left.port}/v1"
        table = RouteTable.model_validate_json(settings.routes_file.read_bytes())
        assert table.version > version and all(row.replicas for row in table.models)
        # Adopted ones are watched like our own.
        os.kill(pids["a-0"], signal.SIGKILL)
        await until(scheduler, lambda status: model(status, "a").pid not in (None, pids["a-0"]))
        status = await ready(scheduler)
        assert model(status, "b").pid == pids["b-0"]


async def test_an_adopted_gateway_that_dies_is_replaced_on_its_port(tmp_path: Path, settings: Config) -> None:
    left = await left_behind(tmp_path, settings, "a")
    gateway = next(unit for unit in left.units if unit.kind == "gateway")
    async with running(settings, entry("a")) as scheduler:
        await ready(scheduler)
        os.kill(gateway.pid, signal.SIGKILL)
        await until(scheduler, lambda status: status.gateways[0].state != "ready")
        status = await ready(scheduler)
        assert status.base_url == f"http://127.0.0.1:{left.port}/v1"
        assert status.gateways[0].pid != gateway.pid


async def test_changed_settings_restart_instead_of_adopting(tmp_path: Path, settings: Config) -> None:
    left = {unit.id: unit.pid for unit in (await left_behind(tmp_path, settings, "a", "b")).units}
    async with running(settings, entry("a", context_length=99), entry("b")) as scheduler:
        status = await until(
            scheduler, lambda status: status.ready and model(status, "a").pid not in (None, left["a-0"])
        )
        assert model(status, "b").pid == left["b-0"]
        assert left["a-0"] not in ours(settings)


async def test_models_no_longer_wanted_are_ended(tmp_path: Path, settings: Config) -> None:
    left = {unit.id: unit.pid for unit in (await left_behind(tmp_path, settings, "a", "b")).units}
    async with running(settings, entry("a")) as scheduler:
        await until(scheduler, lambda status: status.ready and left["b-0"] not in ours(settings))


async def test_stop_leftovers_ends_what_a_killed_scheduler_left(tmp_path: Path, settings: Config) -> None:
    left = await left_behind(tmp_path, settings, "a")
    os.kill(next(unit.pid for unit in left.units if unit.id == "a-0"), signal.SIGSTOP)
    lines = await asyncio.to_thread(stop_leftovers, settings)
    assert len(lines) == 2 and any("a-0" in line for line in lines)
    assert await asyncio.to_thread(stop_leftovers, settings) == []


def sleeper(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    return subprocess.Popen(argv, env=os.environ | environment, start_new_session=True)


async def test_leaderless_children_of_before_are_ended_at_the_start(settings: Config) -> None:
    token = f"{scope_of(settings)}/m-0/0123"
    child = sleeper({groups.TOKEN_VARIABLE: token})
    async with running(settings, entry("m")) as scheduler:
        await ready(scheduler)
        assert child.wait(5) == -signal.SIGKILL


async def test_a_number_used_again_by_another_process_is_left_alone(settings: Config) -> None:
    stranger = sleeper({})
    try:
        seen = groups.see(stranger.pid)
        assert seen
        record = {
            "id": "m-0",
            "kind": "runner",
            "pid": stranger.pid,
            "started": seen.started - 1,
            "token": f"{scope_of(settings)}/m-0/ab",
            "fingerprint": "x",
            "state": "ready",
        }
        state = load(settings.state_file).model_dump() | {"units": [record]}
        settings.state_file.parent.mkdir(parents=True)
        settings.state_file.write_text(StateFile.model_validate(state).model_dump_json())
        async with running(settings, entry("m")) as scheduler:
            assert model(await ready(scheduler)).pid != stranger.pid
        assert await asyncio.to_thread(stop_leftovers, settings) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_a_second_scheduler_is_refused_by_name(settings: Config) -> None:
    async with running(settings, entry("m")) as scheduler:
        await ready(scheduler)
        with pytest.raises(SchedulerError, match=f"already runs .*{os.getpid()}"):
            await make(settings, entry("m")).run()
        with pytest.raises(SchedulerError, match="already runs"):
            await asyncio.to_thread(stop_leftovers, settings)
        assert (await ready(scheduler)).models[0].restarts == 0


async def test_a_taken_port_is_told_before_anything_starts(settings: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        changed = settings.model_copy(update={"port": port})
        with pytest.raises(SchedulerError, match=rf"port {port} on 127.0.0.1 is taken by .*HEARTH_PORT="):
            await make(changed, entry("m")).run()
    assert not ours(settings)


async def test_several_gateway_workers_share_the_port(tmp_path: Path) -> None:
    settings = config(tmp_path, gateway={"workers": 3})
    async with running(settings, entry("m")) as scheduler:
        status = await ready(scheduler)
        seen = set()
        async with asyncio.timeout(10):
            while seen != {gateway.pid for gateway in status.gateways}:
                async with aiohttp.ClientSession() as session, session.get(status.base_url) as answer:
                    seen.add(int(await answer.text()))
        assert len(seen) == 3


async def test_the_control_socket_tells_the_status_and_stops(settings: Config) -> None:
    scheduler = make(settings, entry("m"))
    task = asyncio.create_task(scheduler.run())
    await ready(scheduler)
    connector = aiohttp.UnixConnector(str(settings.control_socket))
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.get("http://hearth/status") as answer:
            status = Status.model_validate_json(await answer.read())
        assert status.ready and status.scheduler.pid == os.getpid() and status.models[0].state == "ready"
        async with session.get("http://hearth/routes?after=0&wait=5") as answer:
            table = RouteTable.model_validate_json(await answer.read())
        watch = asyncio.create_task(read(session, f"http://hearth/routes?after={table.version}&wait=30"))
        await asyncio.sleep(0.05)
        assert status.models[0].pid
        os.kill(status.models[0].pid, signal.SIGKILL)
        news = RouteTable.model_validate_json(await asyncio.wait_for(watch, 5))
        assert news.version > table.version and news.models[0].state == "failed"
        async with session.get("http://hearth/routes?after=x") as answer:
            assert answer.status == 400
        async with session.post("http://hearth/stop", json={"drain": False}) as answer:
            assert answer.status == 202
        await asyncio.wait_for(task, 10)


async def read(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.get(url) as answer:
        return await answer.read()


async def test_logs_are_kept_apart_by_start_and_set_aside_when_big(settings: Config) -> None:
    log = settings.log_dir / "m-0.log"
    log.parent.mkdir(parents=True)
    with log.open("wb") as file:
        file.truncate(17 * 1024 * 1024)
    async with running(settings, entry("m")) as scheduler:
        await ready(scheduler)
        assert log.stat().st_size < 1000 and log.with_name("m-0.log.1").exists()
