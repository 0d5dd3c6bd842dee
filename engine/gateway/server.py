"""The HTTP server of one gateway process: uvicorn with uvloop and httptools around the application."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import io
import logging
import math
import socket

import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.config import Config
from engine.errors import bad_request
from engine.gateway.app import Gateway

#: glibc's names for two bounds of malloc, and the bounds: a block of this size or more is mapped by itself,
#: and free memory of this size stays with the process. The first is the largest that glibc takes.
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 32 * 1024 * 1024
_M_TRIM_THRESHOLD, _KEPT_BYTES = -1, 64 * 1024 * 1024

#: New objects between two looks of the collector at them.
_YOUNG_OBJECTS = 10_000

#: Longer than any usual client keeps an idle connection, so that it is the client who closes.
_IDLE_S = 75
_UNFINISHED = "returned without completing response"


class _Flow(FlowControl):
    """Remembers whether the application has asked for the body that is being read."""

    asked = False

    def resume_reading(self) -> None:
        self.asked = True
        super().resume_reading()


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with long bodies in one piece, and the envelope as answer to what is no HTTP.

    A body goes to the application as one message, or as what there is of it once that is over the limit:
    uvicorn stops and starts reading for every 64 KiB, and each piece is a turn of the event loop. Until the
    application asks for the body (it looks at the key first) no more than that is read here either.
    """

    max_body_bytes: int

    # uvicorn narrows asyncio's own parameter in the same way.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        #: What has come of the body of `cycle`; None when the rest is not wanted.
        self._body: io.BytesIO | None = None

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._body = io.BytesIO()
        self._flow.asked = False

    def on_body(self, body: bytes) -> None:
        if self._body is None:
            return
        self._body.write(body)
        size = self._body.tell()
        if size > self.max_body_bytes:
            self._flow.pause_reading()
            self._hand_over(self._body)
            self.cycle.message_event.set()
        elif size > HIGH_WATER_LIMIT and not self._flow.asked:
            self._flow.pause_reading()

    def on_message_complete(self) -> None:
        if self._body is not None:
            self._hand_over(self._body)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.response_complete:
            # Else this was an earlier request of a pipeline.
            self._body = None
        super().on_response_complete()
        self._flow.asked = False

    def _hand_over(self, body: io.BytesIO) -> None:
        # The cycle makes bytes of it, which of bytes is no copy.
        self.cycle.body = body.getvalue()  # type: ignore[assignment]
        self._body = None

    def send_400_response(self, msg: str) -> None:
        body = bad_request(msg, code="invalid_http").body()
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn server whose `run` has the process to itself."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        _settle_memory()
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What the application has loaded by now stays as well: database, migrations, plans and keys.
        gc.collect()
        gc.freeze()
        # A few dozen requests under way are more objects than the usual 700: each look at them would find
        # nearly all of them alive.
        gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])


def make_server(config: Config, gateway: Gateway) -> uvicorn.Server:
    """A server that has yet to be given its listening socket (`run(sockets=[…])`)."""

    class Bounded(Protocol):
        max_body_bytes = config.gateway.max_body_bytes

    return Server(
        uvicorn.Config(
            gateway,
            http=Bounded,
            loop="uvloop",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=max(1, math.ceil(config.gateway.drain_s)),
        )
    )


def _settle_memory() -> None:
    """Spares requests what a long-running process would do over and over with its memory."""
    # The modules are here to stay: the collector need not go through them time and again.
    gc.collect()
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        # Memory fresh from the kernel costs a fault for every 4 KiB, for a body of 5 MB more than all else.
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def listen(config: Config, fd: int | None) -> socket.socket:
    """The listening socket: one inherited from the scheduler, or a new one on the configured address.

    Raises:
        OSError: the fd is no socket, or the address cannot be bound.
    """
    if fd is not None:
        return socket.socket(fileno=fd)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    return socket.create_server((config.host, config.port), family=family, backlog=2048)


def set_up_logging(level: str) -> None:
    """Human-readable lines on standard error."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    for noisy in ("asyncio", "aiohttp", "filelock", "PIL", "python_multipart"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_not_unfinished)


def _not_unfinished(record: logging.LogRecord) -> bool:
    """An answer left unfinished on purpose (its runner has gone) is told by our own line."""
    return _UNFINISHED not in record.getMessage()
