"""One request and its answer: the names, times and byte counts that headers, metrics and log need."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from engine.errors import ApiError
from engine.gateway.fair.costs import Ask
from engine.metering.keyring import Caller

if TYPE_CHECKING:
    from engine.gateway.ticket import Ticket

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: Status of the log line and the metrics when the client left before an answer began (nginx's number).
CLIENT_GONE = 499

#: Where a request's Exchange is kept in its ASGI scope.
SCOPE_KEY = "hearth.exchange"

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer any more."""


class Exchange:
    """What is known of one request while it is answered."""

    __slots__ = (
        "_send",
        "address",
        "ask",
        "bytes_in",
        "bytes_out",
        "caller",
        "complete",
        "endpoint",
        "first_byte_s",
        "headers",
        "is_events",
        "key_id",
        "model",
        "own_id",
        "request_id",
        "scope",
        "standing",
        "started",
        "status",
        "ticket",
        "upstream_id",
        "waited_s",
    )

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self._send = send
        self.started = time.perf_counter()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        # `own_id` is the ledger's name of it: this server's own, whatever a client calls its requests.
        given = self.headers.get(b"x-request-id")
        if given is not None and _SANE_ID.fullmatch(given):
            self.request_id = given.decode("ascii")
            # Two requests may bear one client's id; a runner must still be able to tell them apart.
            self.upstream_id = f"{self.request_id}-{secrets.token_hex(4)}"
            self.own_id = _new_id()
        else:
            self.request_id = self.upstream_id = self.own_id = _new_id()
        self.endpoint = "other"
        self.model = ""
        #: What of its body tells its cost; None until it is read.
        self.ask: Ask | None = None
        self.key_id = "-"
        #: The caller's address for the log; behind trusted proxies whom they name.
        self.address = "-"
        #: Whose key it came with; None where none is asked for.
        self.caller: Caller | None = None
        #: The lines about the caller's limits in the answer's head, by its status; None where there are none.
        self.standing: Callable[[int], list[tuple[bytes, bytes]]] | None = None
        #: What it holds of limits and budgets, once it is admitted.
        self.ticket: Ticket | None = None
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.first_byte_s: float | None = None
        #: How long it has waited for its model to wake, seconds.
        self.waited_s = 0.0
        self.complete = False
        #: Whether the answer that has begun is a stream of server-sent events.
        self.is_events = False

    @property
    def begun(self) -> bool:
        """Whether the answer's status has been sent."""
        return self.status != 0

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    async def send(self, message: Message) -> None:
        """The ASGI send of this request: adds the headers of every answer and counts."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            spent = self.elapsed_s()
            lines = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode("ascii")),
                (b"openai-processing-ms", b"%d" % (spent * 1000)),
            ]
            if self.standing is not None:
                lines += self.standing(self.status)
            message["headers"] = lines
        else:
            body = message.get("body", b"")
            if body and self.first_byte_s is None:
                self.first_byte_s = self.elapsed_s()
            self.bytes_out += len(body)
            if not message.get("more_body", False):
                self.complete = True
        await self._send(message)


def _new_id() -> str:
    # The time first: the ledger's index then grows at its end, which costs a database a third of random ids.
    return f"req_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


async def send_error(send: Send, error: ApiError) -> None:
    """The envelope as a whole answer."""
    await send_json(send, error.status, error.body(), error.headers)


async def send_json(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """A whole JSON answer; `headers` are further ones."""
    lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    for name, value in (headers or {}).items():
        lines.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
