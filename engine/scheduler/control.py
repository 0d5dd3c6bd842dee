"""The scheduler's own small server, on a Unix socket that only this user may open."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web

from engine.scheduler.publish import RouteBoard
from engine.scheduler.status import Status

#: Longest a watch on the routes may wait, seconds.
_LONGEST_WAIT_S = 60.0


def control_app(
    *, status: Callable[[], Status], board: RouteBoard, stop: Callable[[bool], None]
) -> web.Application:
    """``GET /status``, ``GET /routes?after=VERSION&wait=SECONDS``, ``POST /stop {"drain": bool}``."""

    async def get_status(_: web.Request) -> web.Response:
        return web.Response(text=status().model_dump_json(), content_type="application/json")

    async def get_routes(request: web.Request) -> web.Response:
        try:
            after = int(request.query.get("after", "-1"))
            wait_s = min(_LONGEST_WAIT_S, max(0.0, float(request.query.get("wait", "0"))))
        except ValueError:
            raise web.HTTPBadRequest(text="'after' is a version and 'wait' is in seconds") from None
        table = await board.after(after, wait_s)
        return web.Response(text=table.model_dump_json(), content_type="application/json")

    async def post_stop(request: web.Request) -> web.Response:
        body = await request.read()
        try:
            wanted = json.loads(body) if body else {}
            drain = wanted.get("drain", True)
        except (ValueError, AttributeError):
            raise web.HTTPBadRequest(text='the body is {"drain": true or false}') from None
        stop(bool(drain))
        return web.json_response({"stopping": True}, status=202)

    app = web.Application()
    app.router.add_get("/status", get_status)
    app.router.add_get("/routes", get_routes)
    app.router.add_post("/stop", post_stop)
    return app


@contextlib.asynccontextmanager
async def serve_control(app: web.Application, socket: Path) -> AsyncIterator[None]:
    """Serves ``app`` on ``socket`` (mode 0600) for the duration of the block."""
    _remove(socket)
    # A watch that still waits is cut off at the end: gateways try again anyway.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.UnixSite(runner, str(socket))
        await site.start()
        _restrict(socket)
        yield
    finally:
        await runner.cleanup()
        _remove(socket)


def _remove(socket: Path) -> None:
    socket.unlink(missing_ok=True)


def _restrict(socket: Path) -> None:
    socket.chmod(0o600)
