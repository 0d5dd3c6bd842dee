"""vLLM behind the rules of sleeping: with a server that behaves as it does, and with its own routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.runners.environment import repair_imports
from engine.runners.sleeping import Sleeper
from engine.runners.vllm_errors import OpenAIErrors
from engine.runners.vllm_gate import SleepGate
from tests.runners.asgi import Call


class Server:
    """Answers as vLLM's server does; a request to it while it sleeps would never end."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = 200
        self.left_asleep = False
        self.sleeping = False
        self.more = asyncio.Event()
        routes = [
            Route("/sleep", self.sleep, methods=["POST"]),
            Route("/wake_up", self.wake_up, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.health),
            Route("/v1/models", self.health),
            Route("/collective_rpc", self.health, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.chat, methods=["POST"]),
        ]
        self.sleeper = Sleeper("m")
        self.app = SleepGate(OpenAIErrors(Starlette(routes=routes)), self.sleeper)

    def call(self, target: str, method: str = "POST") -> Call:
        return Call(self.app, method, target)

    async def sleep(self, request: Request) -> Response:
        self.asked.append(f"sleep?{request.url.query}")
        self.sleeping = True
        return JSONResponse({"status": "sleeping", "level": 1}, self.status)

    async def wake_up(self, _: Request) -> Response:
        self.asked.append("wake_up")
        self.sleeping = self.left_asleep
        return JSONResponse({"status": "sleeping" if self.sleeping else "awake"}, self.status)

    async def health(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        return PlainTextResponse("", 200)

    async def chat(self, _: Request) -> Response:
        assert not self.sleeping

        async def parts() -> AsyncIterator[bytes]:
            yield b'"begin'
            await self.more.wait()
            yield b' and end"'

        return StreamingResponse(parts())


CHAT = "/v1/chat/completions"


async def test_it_sleeps_without_cutting_requests_off_and_refuses_new_ones() -> None:
    server = Server()
    assert await server.call("/is_sleeping", "GET").result() == (200, {"is_sleeping": False})
    stream = server.call(CHAT)
    await stream.first_part()
    assert await server.call("/sleep?level=1&mode=wait").code() == (409, "model_busy")
    assert server.asked == []
    server.more.set()
    assert await stream.result() == (200, "begin and end")

    for _ in range(2):
        assert await server.call("/sleep?level=1&mode=abort").result() == (200, {"is_sleeping": True})
    assert server.asked == ["sleep?level=1&mode=wait"]
    for path in (CHAT, "/tokenize"):
        refused = server.call(path)
        assert await refused.code() == (503, "model_asleep")
        assert int(refused.headers["retry-after"]) >= 1
    for path in ("/health", "/metrics", "/v1/models"):
        assert (await server.call(path, "GET").result())[0] == 200

    calls = [server.call("/wake_up") for _ in range(3)]
    assert [await call.result() for call in calls] == [(200, {"is_sleeping": False})] * 3
    assert server.asked.count("wake_up") == 1
    assert await server.call(CHAT).result() == (200, "begin and end")


@pytest.mark.parametrize(("path", "at"), [("/sleep", 500), ("/wake_up", 500), ("/wake_up", 200)])
async def test_a_change_that_fails_makes_it_unwell(
    path: str, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    if path == "/wake_up":
        await server.call("/sleep").result()
    server.status, server.left_asleep = at, True
    assert await server.call(path).code() == (500, "sleep_failed")
    assert f"vLLM answered {at} to {path}" in caplog.text
    assert await server.call("/health", "GET").code() == (503, "model_failed")
    assert await server.call(CHAT).code() == (503, "model_failed")
    assert (await server.call("/metrics", "GET").result())[0] == 200


async def test_other_levels_and_all_other_paths_of_its_developers_are_refused() -> None:
    server = Server()
    for level in ("0", "2", "", "1&level=2"):
        assert await server.call(f"/sleep?level={level}").code() == (400, "invalid_value")
    for path in ("/collective_rpc", "/pause", "/release_kv_cache_memory", "/update_weights", "/v1", "/"):
        assert await server.call(path).code() == (404, "unknown_path")
    assert await server.call("/sleep", "GET").code() == (404, "unknown_path")
    assert server.asked == []


class Client:
    """What vLLM's routes for sleeping ask of its engine."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def sleep(self, level: int, mode: str) -> None:
        self.asked.append((level, mode))

    async def wake_up(self, tags: list[str] | None) -> bool:
        self.asked.append(tags)
        return True

    async def check_health(self) -> None:
        self.asked.append("health")


@pytest.mark.engines
async def test_the_installed_vllms_own_routes_are_what_the_gate_expects() -> None:
    repair_imports()
    from vllm.entrypoints.serve.dev.rpc.api_router import attach_router as attach_rpc
    from vllm.entrypoints.serve.dev.sleep.api_router import attach_router as attach_sleep
    from vllm.entrypoints.serve.instrumentator.health import router as health
    from vllm.platforms.cpu import CpuPlatform

    app = FastAPI()
    attach_sleep(app)
    attach_rpc(app)
    app.include_router(health)
    app.state.engine_client = client = Client()
    # As in the runner: the wrappers stand where the application has its own stack.
    app.middleware_stack = SleepGate(OpenAIErrors(app.build_middleware_stack()), Sleeper("m"))
    assert await Call(app, "POST", "/sleep?level=1").result() == (200, {"is_sleeping": True})
    assert await Call(app, "GET", "/health").result() == (200, None)
    assert await Call(app, "POST", "/wake_up").result() == (200, {"is_sleeping": False})
    assert client.asked == [(1, "wait"), "health", None]
    assert await Call(app, "POST", "/collective_rpc").code() == (404, "unknown_path")
    assert not CpuPlatform().is_sleep_mode_available()
