"""One HTTP request to an ASGI app, of which a test sees every part of the answer as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any


class Call:
    """A request under way; ``gone.set()`` is its client leaving."""

    def __init__(self, app: Callable[..., Any], method: str, target: str) -> None:
        path, _, query = target.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("runner", 80),
            "client": None,
            "root_path": "",
        }
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.gone = asyncio.Event()
        self._changed = asyncio.Event()
        self._given = False
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        elif message.get("body"):
            self.parts.append(message["body"])
        self._changed.set()

    async def first_part(self) -> None:
        async with asyncio.timeout(10):
            while not self.parts:
                self._changed.clear()
                await self._changed.wait()

    async def result(self) -> tuple[int, Any]:
        """Status and decoded body of the whole answer; None for an empty one."""
        await asyncio.wait_for(self.task, 10)
        body = b"".join(self.parts)
        return self.status, json.loads(body) if body else None

    async def code(self) -> tuple[int, str]:
        """Status and code of an answer that is an error envelope."""
        status, body = await self.result()
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return status, body["error"]["code"]
