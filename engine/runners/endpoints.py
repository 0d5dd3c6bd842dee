"""The HTTP edge of a runner: endpoints that answer in OpenAI's shapes and stop when their client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ApiError, bad_request
from engine.runners.logs import request_id

if TYPE_CHECKING:
    from engine.runners.base import Runner

Handler = Callable[[Request], Awaitable[Response]]
Shape = TypeVar("Shape", bound=BaseModel)
log = logging.getLogger("hearth.runner")

#: Above the gateway's own bound; only there so that a runner tried alone cannot be filled up.
MAX_BODY_BYTES = 256 * 1024 * 1024
CLIENT_GONE = 499  # nginx's number; only ever seen in metrics and logs


def endpoint(handler: Handler) -> ASGIApp:
    """Makes an ASGI endpoint of ``async def handler(request) -> Response``, for Starlette's ``Route``.

    - 503 until the model is loaded, and while it is not awake; keeps it awake to the answer's last byte;
    - ``ApiError`` and form errors become OpenAI's envelope; any other exception is logged with its traceback
      and answered 500 without it; in the middle of an event stream, either becomes a ``data: {"error": …}``
      event;
    - when the client goes, the handler's task is cancelled, whether it computes or streams;
    - counts metrics, and answers with the request's ``x-request-id`` (or a new one).
    """
    return _Endpoint(handler)


class _Endpoint:
    # A class, since Starlette takes a function for a request-response handler and wraps it.
    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        runner: Runner = scope["app"].state.runner
        metrics = runner.metrics
        exchange = _Exchange(scope, send)
        token = request_id.set(exchange.id)
        started = time.perf_counter()
        try:
            with metrics.in_flight.track_inprogress(), runner.sleeper.visit() as refusal:
                await self._exchange(scope, receive, exchange, runner, refusal)
        finally:
            seconds = time.perf_counter() - started
            metrics.answered(exchange.status, seconds)
            log.info("%s %s %d %.3f s", scope["method"], scope["path"], exchange.status, seconds)
            request_id.reset(token)

    async def _exchange(
        self, scope: Scope, receive: Receive, exchange: _Exchange, runner: Runner, refusal: ApiError | None
    ) -> None:
        gone = asyncio.Event()
        try:
            body = await _read_body(receive)
        except ApiError as error:
            await exchange.fail(error)
            return
        if body is None:
            exchange.status = CLIENT_GONE
            return
        if refusal is not None:  # only now: a client that still sends would not read it
            await exchange.fail(refusal)
            return
        answering = asyncio.create_task(self._answer(scope, _replay(body, gone), exchange, runner))
        watching = asyncio.create_task(_until_disconnect(receive, gone))
        try:
            await asyncio.wait([answering, watching], return_when=asyncio.FIRST_COMPLETED)
            if exchange.complete:
                await asyncio.wait([answering])
            elif not answering.done():
                exchange.status = CLIENT_GONE
                answering.cancel()
        finally:
            # Also reached when this very task is cancelled, at the end of a drain.
            watching.cancel()
            if not answering.done():
                answering.cancel()
                await asyncio.wait([answering])
        if not answering.cancelled():
            answering.result()

    async def _answer(self, scope: Scope, receive: Receive, exchange: _Exchange, runner: Runner) -> None:
        request = Request(scope, receive)
        try:
            if runner.state == "loading":
                raise runner.loading()
            response = await self._handler(request)
            await response(scope, receive, exchange.send)
        except ApiError as error:
            await exchange.fail(error)
        except HTTPException as error:  # Starlette's form parser
            await exchange.fail(
                ApiError(error.status_code, str(error.detail).rstrip(".") + ".", code="invalid_form")
            )
        except Exception:  # the last resort of a server: whatever it is, the client gets an envelope
            log.exception("%s %s failed", scope["method"], scope["path"])
            await exchange.fail(
                ApiError(
                    500,
                    f"{runner.spec.model} failed at this request. Its log says why, at id {exchange.id}.",
                    code="internal_error",
                )
            )
        finally:
            with contextlib.suppress(Exception):  # temporary files of a form: gone either way
                await request.close()


class _Exchange:
    """One request's answer as it is sent."""

    def __init__(self, scope: Scope, send: Send) -> None:
        headers = dict(scope["headers"])
        self.id = headers.get(b"x-request-id", b"").decode("latin-1") or f"req_{uuid.uuid4().hex}"
        self.status = 500
        #: The whole answer is out: uvicorn tells a disconnect then too, whether or not the client has gone.
        self.complete = False
        self._started = False
        self._events = False
        self._scope = scope
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started, self.status = True, message["status"]
            headers = [pair for pair in message.get("headers", []) if pair[0].lower() != b"x-request-id"]
            self._events = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in headers
            )
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode("latin-1"))]}
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Answers with the error: as a whole response, or as the last event of a stream under way."""
        if not self._started:
            response = Response(
                error.body(), error.status, headers=error.headers, media_type="application/json"
            )
            await response(self._scope, _never, self.send)
            return
        self.status = error.status
        if not self._events:
            raise error  # uvicorn cuts the connection: a whole-looking answer would be a lie
        await self._send({"type": "http.response.body", "body": error.event(), "more_body": False})


class EventStream(Response):
    """Server-sent events from an async iterator of ``bytes`` (whole events).

    The answer starts with the first event, so an error before it still has a status of its own.
    The iterator is closed when the client goes.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for event in self._events:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()
        if not started:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: Any) -> bytes:
    """One server-sent event with ``data`` as JSON."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def read_json(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        ApiError: 400 ``invalid_json`` when it is not UTF-8, not JSON or not an object.
    """
    body = await request.body()
    if not body:
        raise bad_request("The request body is empty; send a JSON object.", code="invalid_json")
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The request body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(data, dict):
        raise bad_request("The request body must be a JSON object.", code="invalid_json")
    return data


def validated(shape: type[Shape], data: dict[str, Any]) -> Shape:
    """The data as a pydantic model.

    Raises:
        ApiError: 400 naming the first field at fault; code ``missing_field`` or ``invalid_value``.
    """
    try:
        return shape.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # Names of union members and functions are the library's own, not the client's.
        where = ".".join(str(part) for part in first["loc"] if str(part).replace("_", "").isalnum())
        if first["type"] == "missing":
            raise bad_request(
                f"Missing required field '{where}'.", param=where, code="missing_field"
            ) from error
        said = first["msg"].removeprefix("Value error, ")
        raise bad_request(f"Invalid '{where}': {said}.", param=where or None, code="invalid_value") from error


def plain_routes(runner: Runner) -> list[BaseRoute]:
    """Health, metrics and the model list: what every runner answers, also while loading."""

    async def health(_: Request) -> Response:
        ok = runner.status not in ("loading", "stopping", "failed")  # asleep is well, too
        body = {"status": runner.status, "model": runner.spec.model, "category": runner.spec.category}
        return JSONResponse(body, 200 if ok else 503)

    async def metrics(_: Request) -> Response:
        return Response(runner.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(_: Request) -> Response:
        names = [runner.spec.model, *runner.spec.aliases]
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "hearth"} for name in names]
        return JSONResponse({"object": "list", "data": rows})

    async def unknown(request: Request) -> Response:
        error = ApiError(
            404,
            f"{request.method} {request.url.path} is not served by this {runner.spec.category} runner.",
            code="unknown_path",
        )
        return Response(error.body(), error.status, media_type="application/json")

    every_method = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    return [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/{path:path}", unknown, methods=every_method),
    ]


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None when the client went before its end."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(
                413, f"The request body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large"
            )
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, gone: asyncio.Event) -> Receive:
    """A ``receive`` that gives the body once, then a disconnect when the client goes."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _until_disconnect(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _never() -> Message:
    raise RuntimeError("an error answer reads nothing")
