"""Puts the experts' loads behind the engine's own /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

from engine.runners.vllm_errors import App, Message, Receive, Send

#: What would make the engine answer in another format, to which our text cannot be added.
_NEGOTIATION = (b"accept", b"accept-encoding")


class ExpertMetrics:
    """ASGI wrapper that adds ``text()`` to good answers of ``GET /metrics`` and touches nothing else."""

    def __init__(self, app: App, text: Callable[[], bytes]) -> None:
        """``text`` is called in a thread, since it reads files."""
        self._app = app
        self._text = text

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != "/metrics":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in _NEGOTIATION]
        await self._app({**scope, "headers": headers}, receive, _Longer(send, self._text).send)


class _Longer:
    def __init__(self, send: Send, text: Callable[[], bytes]) -> None:
        self._send = send
        self._text = text
        self._more = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._more = await asyncio.to_thread(self._text)
            message = {**message, "headers": _without_length(message.get("headers", ()), len(self._more))}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + self._more}
        await self._send(message)


def _without_length(headers: Any, more: int) -> list[tuple[bytes, bytes]]:
    return [
        (name, str(int(value) + more).encode()) if name.lower() == b"content-length" else (name, value)
        for name, value in headers
    ]
