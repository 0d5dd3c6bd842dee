"""The gateway as a process: its socket handed over, its drain, its shared metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from engine.config import ROOT, Config
from engine.metering.keys import digest_of
from engine.routes import RouteTable
from tests.gateway.dummy import KEY, DummyRunner, route

CHAT = "/v1/chat/completions"
HEADERS = {"authorization": f"Bearer {KEY}"}


def settings(folder: Path, runner: DummyRunner, workers: int = 1) -> Path:
    config = Config.model_validate({"state_dir": folder, "gateway": {"workers": workers, "drain_s": 5}})
    # As Hearth kept keys before it had a database: taken in when the gateway starts.
    config.keys_file.write_text(json.dumps([{"id": "key_1", "sha256": digest_of(KEY)}]))
    config.routes_file.write_text(RouteTable(version=1, models=[route("dummy", runner)]).model_dump_json())
    file = folder / "gateway.json"
    file.write_text(json.dumps({"config": config.model_dump(mode="json", exclude={"api_key"})}))
    return file


@contextlib.asynccontextmanager
async def process(file: Path, listener: socket.socket) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "engine.gateway",
        "--settings",
        str(file),
        "--fd",
        str(listener.fileno()),
        pass_fds=[listener.fileno()],
        cwd=ROOT,
        start_new_session=True,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


@pytest.fixture
def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


async def test_sigterm_lets_requests_finish_and_exits_0(
    tmp_path: Path, runner: DummyRunner, listener: socket.socket
) -> None:
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    runner.behaviour = "slow"
    with listener:
        async with process(settings(tmp_path, runner), listener) as gateway, aiohttp.ClientSession() as http:
            # The kernel keeps the connection until the gateway listens, so nothing has to be polled.
            asking = asyncio.create_task(http.post(base + CHAT, json={"model": "dummy"}, headers=HEADERS))
            await asyncio.wait_for(runner.arrived.wait(), 30)
            gateway.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert gateway.returncode is None
            runner.go_on.set()
            answer = await asking
            assert answer.status == 200
            assert (await answer.json())["model"] == "dummy"
            assert await asyncio.wait_for(gateway.wait(), 10) == 0


async def test_workers_share_a_port_and_their_metrics(
    tmp_path: Path, runner: DummyRunner, listener: socket.socket
) -> None:
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    file = settings(tmp_path, runner, workers=2)

    async def ask() -> int:
        async with (
            aiohttp.ClientSession() as http,
            http.post(base + CHAT, json={"model": "dummy"}, headers=HEADERS) as answer,
        ):
            return answer.status

    with listener:
        async with process(file, listener), process(file, listener), aiohttp.ClientSession() as http:
            assert [await ask() for _ in range(20)] == [200] * 20
            async with http.get(base + "/metrics") as answer:
                text = await answer.text()
    wanted = 'hearth_gateway_requests_total{endpoint="/v1/chat/completions",model="dummy",status="200"} 20.0'
    assert wanted in text


async def test_settings_that_cannot_be_used_are_a_clear_line(tmp_path: Path, listener: socket.socket) -> None:
    file = tmp_path / "none.json"
    with listener:
        async with process(file, listener) as gateway:
            _, errors = await gateway.communicate()
    assert gateway.returncode == 1
    assert errors.decode().startswith(f"gateway: {file} cannot be used")
    assert b"Traceback" not in errors
