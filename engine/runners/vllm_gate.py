"""Sleeping for vLLM: its server behind the rules of :mod:`engine.runners.sleeping`.

What vLLM 0.32 does by itself, read in its source, and why there is a gate in front of it:

- ``POST /sleep?level=1&mode=wait`` keeps new requests back, lets those under way end, copies the weights to
  host memory and drops the KV cache with its prefixes; the scheduler of its engine stays paused. (The default
  mode, ``abort``, would cut requests off.) ``POST /wake_up`` takes all memory again and resumes.
- A request to a sleeping engine is neither refused nor does it wake it: it waits without end in the engine's
  queue. So it is refused here, with 503 ``model_asleep``.
- ``GET /health`` only asks whether the engine's processes live: 200 while asleep, and still 200 after a wake
  that failed (500, for instance for want of GPU memory). So it is 503 here once a change has failed.
- ``GET /is_sleeping`` is true from the begin of a sleep to the end of the wake; here too.
- These routes come only with ``VLLM_SERVER_DEV_MODE=1``, which brings others along: calls of any method of
  the workers, new weights, pauses. None of those is let through.
- There is no sleep mode on a CPU (``is_sleep_mode_available`` of its platform).

So a sleeping vLLM answers as our own runners do, and the scheduler needs no other rule for it:
``POST /sleep`` is 409 while a request is in hand, both calls may be repeated, and a failure is a 500, after
which ``/health`` is 503.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs

from engine.errors import ApiError, bad_request
from engine.runners.sleeping import Sleeper
from engine.runners.vllm_errors import App, Message, Receive, Send

Scope = MutableMapping[str, Any]

#: Answered awake or asleep, and no reason to stay awake.
_OF_THE_SERVER = frozenset({"/health", "/metrics", "/ping", "/version", "/load", "/v1/models"})
#: Requests of clients beside ``/v1/…``.
_OF_CLIENTS = frozenset({"/tokenize", "/detokenize"})


class SleepGate:
    """ASGI wrapper around vLLM's application. It goes outside of everything that answers requests."""

    def __init__(self, app: App, sleeper: Sleeper) -> None:
        self._app = app
        self._sleeper = sleeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._http(scope, receive, send)
        except ApiError as error:
            headers = {"content-type": "application/json", **error.headers}
            await _answer(send, error.status, error.body(), headers)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method, sleeper = scope["path"], scope["method"], self._sleeper
        if (method, path) == ("POST", "/sleep"):
            level = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("level")
            if level not in (None, ["1"]):
                raise bad_request(
                    "Invalid 'level': this runner knows level 1 only. Leave it out.",
                    param="level",
                    code="invalid_value",
                )
            await sleeper.fall_asleep(lambda: self._ask(scope, "/sleep", b"level=1&mode=wait"))
        elif (method, path) == ("POST", "/wake_up"):
            await sleeper.wake_up(lambda: self._ask(scope, "/wake_up", b""))
        elif (method, path) != ("GET", "/is_sleeping"):
            await self._pass(scope, receive, send)
            return
        body = json.dumps({"is_sleeping": sleeper.is_sleeping}).encode()
        await _answer(send, 200, body, {"content-type": "application/json"})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in _OF_THE_SERVER:
            if path == "/health" and self._sleeper.phase == "failed":
                raise self._sleeper.refusal()
            await self._app(scope, receive, send)
        elif path.startswith("/v1/") or path in _OF_CLIENTS:
            with self._sleeper.visit() as refusal:
                if refusal is not None:
                    raise refusal
                await self._app(scope, receive, send)
        else:
            raise ApiError(
                404, f"{scope['method']} {path} is not served by this runner.", code="unknown_path"
            )

    async def _ask(self, scope: Scope, path: str, query: bytes) -> None:
        """Has vLLM itself do it.

        Raises:
            RuntimeError: with its answer, unless that is 200 and says that all memory is back or given back.
        """
        asked = {**scope, "path": path, "raw_path": path.encode(), "query_string": query, "headers": []}
        status, body, given = 0, b"", False

        async def nothing() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # nobody leaves: the change is wanted, whoever asked for it
            given = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def keep(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        await self._app(asked, nothing, keep)
        expected = b"awake" if path == "/wake_up" else b"sleeping"
        if status != 200 or expected not in body:
            raise RuntimeError(f"vLLM answered {status} to {path}: {body[:1000].decode('utf-8', 'replace')}")


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": False})
