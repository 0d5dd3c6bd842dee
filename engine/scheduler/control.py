"""The scheduler's own small server, on a Unix socket that only this user may open."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web
from pydantic import ValidationError

from engine.errors import ApiError
from engine.scheduler.changes import ReloadCall, Reloaded
from engine.scheduler.messages import UsageReported
from engine.scheduler.publish import RouteBoard
from engine.scheduler.reload import ReloadError
from engine.scheduler.reports import UsageReport, Waiters, WakeCall, WakeRefusedError
from engine.scheduler.status import Status

#: Longest a watch on the routes may wait, seconds.
_LONGEST_WAIT_S = 60.0


def control_app(
    *,
    status: Callable[[], Status],
    board: RouteBoard,
    stop: Callable[[bool], None],
    waiters: Waiters,
    report: Callable[[UsageReported], None],
    reload: Callable[[bool], Awaitable[Reloaded]],
) -> web.Application:
    """The application.

    - ``GET /status``, ``GET /routes?after=VERSION&wait=SECONDS``, ``POST /stop {"drain": bool}``
    - ``POST /wake {"model": id, "worker": pid}``: held until the model is ready; it is asked for as long as
      the connection lives. 200 ``{"state": "ready"}``; 404 unknown, 409 never asleep, 503 stopping.
    - ``POST /reload {"dry_run": bool}``: reads the configuration anew; 200 with what changes
      (:class:`Reloaded`), 409 or 422 with the reason why nothing does.
    - ``POST /usage``: what a gateway worker has in hand (:class:`UsageReport`).
    """

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

    async def post_reload(request: web.Request) -> web.Response:
        body = await request.read()
        try:
            call = ReloadCall.model_validate_json(body or b"{}")
        except ValidationError as error:
            return _refused(400, f'the body is {{"dry_run": true or false}}: {error.errors()[0]["msg"]}')
        try:
            told = await reload(call.dry_run)
        except ReloadError as refused:
            return _refused(refused.status, str(refused))
        return web.Response(text=told.model_dump_json(), content_type="application/json")

    async def post_wake(request: web.Request) -> web.Response:
        try:
            call = WakeCall.model_validate_json(await request.read())
        except ValidationError as error:
            return _refused(400, f'the body is {{"model": id, "worker": pid}}: {error.errors()[0]["msg"]}')
        try:
            await waiters.until_ready(call.model)
        except WakeRefusedError as refused:
            return _refused(refused.status, str(refused))
        return web.json_response({"state": "ready"})

    async def post_usage(request: web.Request) -> web.Response:
        try:
            said = UsageReport.model_validate_json(await request.read())
        except ValidationError as error:
            return _refused(400, f"this is no usage report: {error.errors()[0]['msg']}")
        report(said.event())
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/status", get_status)
    app.router.add_get("/routes", get_routes)
    app.router.add_post("/stop", post_stop)
    app.router.add_post("/reload", post_reload)
    app.router.add_post("/wake", post_wake)
    app.router.add_post("/usage", post_usage)
    return app


def _refused(status: int, reason: str) -> web.Response:
    error = ApiError(status, reason)
    return web.Response(status=status, body=error.body(), content_type="application/json")


@contextlib.asynccontextmanager
async def serve_control(app: web.Application, socket: Path) -> AsyncIterator[None]:
    """Serves ``app`` on ``socket`` (mode 0600) for the duration of the block."""
    _remove(socket)
    # A watch that still waits is cut off at the end: gateways try again anyway. A call of one that has left
    # ends with its connection, for what it asked is asked no longer.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
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
