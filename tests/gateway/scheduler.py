"""A scheduler's control socket without a scheduler: remembers what gateways tell it, holds their calls."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from engine.routes import RouteTable


@dataclass
class FakeScheduler:
    """`/routes`, `/wake` and `/usage` as the contract has them."""

    path: Path
    table: RouteTable = field(default_factory=RouteTable)
    polls: list[str] = field(default_factory=list)
    #: Models asked for, in order; those whose calls are held now; how many calls were closed unanswered.
    wakes: list[dict[str, Any]] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    given_up: int = 0
    usage: list[dict[str, Any]] = field(default_factory=list)
    #: Status and JSON of the answer to a call, by model; without one it is held until `wake_up`.
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    usage_status: int = 200
    _ready: dict[str, asyncio.Event] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/routes", self._routes)
        app.router.add_post("/wake", self._wake)
        app.router.add_post("/usage", self._usage)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        await web.UnixSite(self._runner, str(self.path)).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.path.unlink(missing_ok=True)

    def publish(self, table: RouteTable) -> None:
        self.table = table
        self._changed.set()
        self._changed = asyncio.Event()

    def wake_up(self, model: str) -> None:
        """Answers the calls for the model, those to come too."""
        self._ready.setdefault(model, asyncio.Event()).set()

    async def _routes(self, request: web.Request) -> web.Response:
        self.polls.append(request.query["after"])
        if int(request.query["after"]) == self.table.version:
            await asyncio.wait_for(self._changed.wait(), float(request.query["wait"]))
        return web.json_response(text=self.table.model_dump_json())

    async def _wake(self, request: web.Request) -> web.Response:
        call = await request.json()
        self.wakes.append(call)
        model = call["model"]
        if model in self.answers:
            status, said = self.answers[model]
            return web.json_response(said, status=status)
        self.held.append(model)
        try:
            await self._ready.setdefault(model, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.held.remove(model)
        return web.json_response({"state": "ready"})

    async def _usage(self, request: web.Request) -> web.Response:
        self.usage.append(await request.json())
        return web.json_response({}, status=self.usage_status)
