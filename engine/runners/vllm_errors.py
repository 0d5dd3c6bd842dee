"""vLLM's error bodies in the exact shape of OpenAI's: `code` a string or null, the field as `param`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from engine.errors import ApiError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_MOST_ERROR_BYTES = 1 << 20
_TOO_LONG = re.compile(
    r"maximum context length|max_model_len|longer than the maximum model length|maximum model length", re.I
)
_VALIDATION = re.compile(r"^\d+ validation errors?:\s*(.*)", re.S)
_ITEM = re.compile(r"'loc': '(?:body\.)?([^']*)', 'msg': [\"'](.*?)[\"'](?:, '|})")
#: What vLLM says of pictures (some of it with status 500 or 501), a code, and what a client should read.
_PICTURES = (
    (
        re.compile(r"decompression bomb|exceed the maximum of \d+ pixels"),
        "image_too_large",
        "The image has too many pixels. Send a smaller one.",
    ),
    (
        re.compile(r"from one of the allowed domains"),
        "invalid_image_url",
        "The image URL cannot be used here: a runner fetches nothing. Send it through the gateway, or as a "
        "data URL.",
    ),
    (
        re.compile(r"must be either a HTTP, data or file URL|Only base64 data URLs|Cannot load local files"),
        "invalid_image_url",
        "The image URL must be a base64 data URL (data:image/png;base64,...) or an http(s) URL.",
    ),
    (
        re.compile(r"Failed to load image|cannot identify image|[Nn]on-base64 digit|Incorrect padding"),
        "invalid_image",
        "The image is empty, damaged, truncated or in no known format. Send it again in whole.",
    ),
)
_EVENT = b'data: {"error"'


log = logging.getLogger("vllm.hearth")


class OpenAIErrors:
    """ASGI wrapper that rewrites answers of status 400 and above, and error events in a stream.

    It goes around the whole application, with Starlette's own answer to unexpected errors inside.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        rewriter = _Rewriter(send, scope["path"])
        try:
            await self.app(scope, receive, rewriter.send)
        except Exception:
            # Starlette answers 500 and raises again; the server would then cut the connection, and with it
            # the next request on it. What was answered is done; anything else is the server's affair.
            if not rewriter.complete:
                raise
            log.exception("%s %s failed", scope["method"], scope["path"])


class _Rewriter:
    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        #: Whether the answer has been sent to its end.
        self.complete = False
        self._start: Message | None = None
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        if self._start is None:
            body = message.get("body", b"")
            # vLLM writes one event a message, so a look at its head is enough.
            if body.startswith(_EVENT):
                message = {**message, "body": _event(body, self._path)}
            await self._send(message)
            self.complete = not message.get("more_body", False)
            return
        if len(self._body) < _MOST_ERROR_BYTES:
            self._body += message.get("body", b"")
        if not message.get("more_body", False):
            await self._finish(self._start)

    async def _finish(self, start: Message) -> None:
        status = start["status"]
        error = translate(status, bytes(self._body), self._path)
        body = error.body()
        dropped = (b"content-length", b"content-type", b"content-encoding")
        headers = [(k, v) for k, v in start.get("headers", []) if k.lower() not in dropped]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({**start, "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.complete = True


def translate(status: int, body: bytes, path: str = "/v1/chat/completions") -> ApiError:
    """The error that vLLM's answer ``body`` of ``status`` to a request for ``path`` stands for.

    Understands OpenAI's envelope with a number as code, vLLM's flat one, and FastAPI's ``{"detail": …}``.
    """
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    error = data.get("error", data) if isinstance(data, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    error = error if isinstance(error, dict) else {}
    message = error.get("message") or _detail(error.get("detail")) or body.decode("utf-8", "replace")[:1000]
    message = message or f"The model's server answered {status} without a reason."
    param = error.get("param") if isinstance(error.get("param"), str) else None
    if param is not None and param.startswith("body."):
        param = param.removeprefix("body.")
    if match := _VALIDATION.search(message):
        message = "; ".join(f"{where}: {why}" for where, why in _ITEM.findall(message)) or match[1].strip()
    code = error.get("code") if isinstance(error.get("code"), str) else None
    for pattern, name, sentence in _PICTURES:
        if pattern.search(message):
            return ApiError(400, sentence, param="messages", code=name)
    if status in (400, 413, 422) and _TOO_LONG.search(message):
        field = "messages" if "chat" in path else "prompt"
        return ApiError(400, message, param=field, code="context_length_exceeded")
    if status == 404 and "model" in message:
        code = code or "model_not_found"
    # OpenAI answers a body that is well-formed JSON but wrong with 400.
    return ApiError(400 if status == 422 else status, message, param=param, code=code)


def _detail(detail: Any) -> str:
    if not isinstance(detail, list):
        return str(detail) if detail else ""
    parts = []
    for item in detail:
        if isinstance(item, dict):
            where = ".".join(str(part) for part in item.get("loc", ()) if part != "body")
            parts.append(f"{where}: {item.get('msg', 'is wrong')}" if where else str(item.get("msg", item)))
    return "; ".join(parts)


def _event(body: bytes, path: str) -> bytes:
    """One error event, translated; whatever follows it in the same message (``[DONE]``) is kept."""
    first, separator, rest = body.partition(b"\n\n")
    try:
        code = json.loads(first.removeprefix(b"data: "))["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    event = translate(status, first.removeprefix(b"data: "), path).event()
    return event + rest if separator else event
