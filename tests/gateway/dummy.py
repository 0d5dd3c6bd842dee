"""A runner without a model, and a gateway around it, on real sockets inside the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web
from openai import AsyncOpenAI

from engine.config import Config
from engine.gateway.app import Gateway
from engine.gateway.server import make_server
from engine.metering import keys
from engine.metering.opening import opened
from engine.routes import ModelRoute, Replica, RouteTable

KEY = "hearth-test-key-0123456789abcdef"
FORWARDED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/images/generations",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/detections",
    "/v1/detection",
)


@dataclass
class DummyRunner:
    """Remembers what it was sent; how it answers is told by `behaviour`."""

    path: Path
    name: str = "dummy"
    behaviour: str = "echo"
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    cancelled: int = 0
    asleep: int = 0
    counted: int = 0
    connections: int = 0
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        for path in FORWARDED:
            app.router.add_post(path, self._answer)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    async def listen_on_tcp(self) -> int:
        """Answers on a TCP port too; its number."""
        assert self._runner is not None
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, listener).start()
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.path.unlink(missing_ok=True)

    async def _metrics(self, request: web.Request) -> web.Response:
        text = (
            "# HELP hearth_runner_in_flight Requests.\n# TYPE hearth_runner_in_flight gauge\n"
            'hearth_runner_in_flight 3.0\n# TYPE work_done_total counter\nwork_done_total{kind="a"} 2.0\n'
        )
        return web.Response(text=text)

    async def _tokenize(self, request: web.Request) -> web.Response:
        """A token for each word, as the runner of a model counts them."""
        asked = await request.json()
        self.counted += 1
        texts = [asked["prompt"]] if "prompt" in asked else [each["content"] for each in asked["messages"]]
        return web.json_response({"count": sum(len(text.split()) for text in texts), "max_model_len": 1})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.path, {k.lower(): v for k, v in request.headers.items()}, body))
        self.arrived.set()
        try:
            return await getattr(self, f"_{self.behaviour}")(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _echo(self, request: web.Request, body: bytes) -> web.Response:
        answer = {
            "id": "c-1",
            "object": "chat.completion",
            "created": 1,
            "model": self.name,
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
            ],
        }
        return web.json_response(answer, headers=self.headers)

    async def _fixed(self, request: web.Request, body: bytes) -> web.Response:
        headers = {"content-type": "application/json", **self.headers}
        return web.Response(status=self.status, body=self.body, headers=headers)

    async def _asleep(self, request: web.Request, body: bytes) -> web.Response:
        """What a runner of ours says that has been put to sleep."""
        self.asleep += 1
        error = {"message": "asleep", "type": "service_unavailable_error", "code": "model_asleep"}
        return web.json_response({"error": {**error, "param": None}}, status=503)

    async def _brief(self, request: web.Request, body: bytes) -> web.Response:
        await asyncio.sleep(0.003)
        return await self._echo(request, body)

    async def _slow(self, request: web.Request, body: bytes) -> web.Response:
        await self.go_on.wait()
        return await self._echo(request, body)

    async def _die(self, request: web.Request, body: bytes) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _stream(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = await self._begin(request, "text/event-stream; charset=utf-8")
        for word in ("one ", "two ", "three"):
            await response.write(chunk(word))
            self.go_on.clear()
            if word == "one ":
                await self.go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _quick_stream(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = await self._begin(request, "text/event-stream")
        await response.write(self.body)
        await response.write_eof()
        return response

    async def _break_stream(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = await self._begin(request, "text/event-stream")
        await response.write(chunk("one ") + b'data: {"half": ')
        await asyncio.sleep(0.01)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _endless_stream(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = await self._begin(request, "text/event-stream")
        while True:
            await response.write(chunk("more "))
            await asyncio.sleep(0.002)

    async def _break_bytes(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = await self._begin(request, "application/json")
        await response.write(b'{"data": [' + b"0," * 1000)
        await asyncio.sleep(0.01)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _begin(self, request: web.Request, kind: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": kind})
        response.enable_chunked_encoding()
        await response.prepare(request)
        return response


def chunk(text: str) -> bytes:
    """One chat completion chunk as an event."""
    data = {
        "id": "c-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "dummy",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@dataclass
class House:
    """A gateway, its address and its folder."""

    base: str
    gateway: Gateway
    config: Config
    http: aiohttp.ClientSession
    server: uvicorn.Server
    client: AsyncOpenAI | None = None

    @property
    def openai(self) -> AsyncOpenAI:
        """The real client, made when it is first asked for."""
        if self.client is None:
            self.client = AsyncOpenAI(base_url=f"{self.base}/v1", api_key=KEY, max_retries=0, timeout=10)
        return self.client

    def serve(self, *routes: ModelRoute) -> None:
        """Puts a route table in force at once."""
        self.gateway.directory.replace(
            RouteTable(version=self.gateway.directory.version + 1, models=list(routes))
        )

    async def post(
        self, path: str, json_: Any = None, *, data: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers (lower case) of a POST."""
        given = {"authorization": f"Bearer {KEY}", **(headers or {})}
        if json_ is not None:
            data = json.dumps(json_).encode()
            given.setdefault("content-type", "application/json")
        async with self.http.post(self.base + path, data=data, headers=given) as response:
            body = await response.read()
            return (
                response.status,
                json.loads(body) if body else None,
                {name.lower(): value for name, value in response.headers.items()},
            )

    async def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        given = {"authorization": f"Bearer {KEY}", **headers}
        async with self.http.get(self.base + path, headers=given) as response:
            headers_ = {name.lower(): value for name, value in response.headers.items()}
            return response.status, await response.text(), headers_


@contextlib.asynccontextmanager
async def open_house(state_dir: Path, *routes: ModelRoute, **settings: Any) -> AsyncIterator[House]:
    """A gateway on a free port; nothing of it is left afterwards."""
    config = Config(state_dir=state_dir, **settings)
    async with opened(config) as database:
        await keys.create(database, key=KEY)
    gateway = Gateway(config)
    server = make_server(config, gateway)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    # What `serve` does, without its signal handlers and its tick of 0.1 s.
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[listener])
    base = f"http://127.0.0.1:{port}"
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))
    house = House(base, gateway, config, session, server)
    if routes:
        house.serve(*routes)
    try:
        yield house
    finally:
        if house.client is not None:
            await house.client.close()
        await session.close()
        # What `shutdown` does when nothing is in flight, without its sleep of 0.1 s.
        for each in server.servers:
            each.close()
        await until(lambda: not server.server_state.connections)
        await server.lifespan.shutdown()


def route(name: str, *runners: DummyRunner, category: str = "chat", **more: Any) -> ModelRoute:
    """A row of the table: ready when it has runners."""
    more.setdefault("state", "ready" if runners else "warming")
    replicas = [Replica(id=f"{name}-{i}", socket=str(runner.path)) for i, runner in enumerate(runners)]
    return ModelRoute.model_validate(
        {"id": name, "category": category, "replicas": replicas, "at": time.time(), **more}
    )


async def until(true: Any, within_s: float = 3.0) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.002)
