"""The connections to one replica.

The rest of the gateway knows a replica by :class:`Upstream` and an answer by :class:`Answer` alone, so
another client (one at protocol level, say) can take aiohttp's place here.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp.abc import AbstractStreamWriter

#: Shorter than the 5 s after which uvicorn closes an idle connection, so that it is rarely closed under a
#: request.
IDLE_S = 4.0
#: An answer no longer than this is read whole before its first byte is passed on.
WHOLE_BYTES = 1024 * 1024
#: A reused connection that fails sooner was closed by the replica while idle; later, the replica died at
#: its work.
_STALE_S = 1.0
#: A longer body is written apart from the request's head.
_LONG_BYTES = 128 * 1024
#: Send buffer of a Unix socket that takes long bodies; Linux grants no more than net.core.wmem_max.
_SEND_BYTES = 4 * 1024 * 1024

#: Belong to one connection, or are set anew by this gateway.
_OWN_HEADERS = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"date",
        b"server",
        b"x-request-id",
        b"openai-processing-ms",
    }
)


class UpstreamLostError(Exception):
    """The replica could not be reached, or left before its answer was whole.

    `unsent` is true when the replica cannot have begun the work: there was no connection, or it was an idle
    one from an earlier request that had been closed meanwhile. Such a request may be sent again.
    """

    def __init__(self, reason: str, *, unsent: bool) -> None:
        super().__init__(reason)
        self.unsent = unsent


class Answer:
    """A replica's answer, its status and headers read, its body still coming."""

    __slots__ = ("_response", "content_type", "headers", "length", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = [
            (name, value) for key, value in response.raw_headers if (name := key.lower()) not in _OWN_HEADERS
        ]
        #: As it came; empty where it has none.
        self.content_type = next((value for name, value in self.headers if name == b"content-type"), b"")
        self.length = response.content_length

    @property
    def is_stream(self) -> bool:
        """Whether it is server-sent events."""
        return self.content_type.lower().startswith(b"text/event-stream")

    async def read(self, limit: int) -> bytes:
        """The body, cut off after `limit` bytes.

        Raises:
            UpstreamLostError: it ended too early.
        """
        parts: list[bytes] = []
        size = 0
        async for chunk in self.chunks():
            parts.append(chunk)
            size += len(chunk)
            if size >= limit:
                break
        return b"".join(parts)[:limit]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes in.

        Raises:
            UpstreamLostError: it ended too early.
        """
        content = self._response.content
        try:
            while chunk := await content.readany():
                yield chunk
        except (aiohttp.ClientError, ConnectionError) as error:
            raise UpstreamLostError(_words(error), unsent=False) from error

    def close(self) -> None:
        """Ends it: pooled when it was read whole, else the connection is closed, which cancels the work."""
        self._response.close()


class Upstream:
    """One replica: its address, how many requests it has in hand, its pooled connections."""

    def __init__(self, id: str, address: str, *, connect_timeout_s: float) -> None:
        self.id = id
        #: The tenant whose requests alone go there, by name or id; None = shared.
        self.owner: str | None = None
        self.address = address
        self.in_flight = 0
        #: When its last request began or ended, on the monotonic clock; its own beginning until there is one.
        self.last = time.monotonic()
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None
        #: Set while it is out of the table: told when its last request has ended.
        self._on_gone: Callable[[Upstream], None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def post(self, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        """Sends a request and waits for the answer's head.

        Raises:
            UpstreamLostError: no connection, or the replica left before its first byte.
        """
        session = self._session or self._open()
        connection = SimpleNamespace(reused=False)
        started = time.monotonic()
        data: bytes | _LongBody = body if len(body) <= _LONG_BYTES else _LongBody(body)
        try:
            response = await session.post(
                self._url(path),
                data=data,
                headers=headers,
                allow_redirects=False,
                trace_request_ctx=connection,
            )
        except aiohttp.ClientConnectorError as error:
            raise UpstreamLostError(_words(error), unsent=True) from error
        except (aiohttp.ConnectionTimeoutError, FileNotFoundError) as error:
            raise UpstreamLostError(_words(error), unsent=True) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            quick = time.monotonic() - started < _STALE_S
            raise UpstreamLostError(_words(error), unsent=connection.reused and quick) from error
        return Answer(response)

    async def text(self, path: str, *, within_s: float) -> str:
        """The body of a GET, for instance the replica's metrics.

        Raises:
            UpstreamLostError: it did not answer 200 in time.
        """
        session = self._session or self._open()
        try:
            async with session.get(
                self._url(path),
                timeout=aiohttp.ClientTimeout(total=within_s),
                headers={"accept": "text/plain"},
            ) as response:
                if response.status != 200:
                    raise UpstreamLostError(f"status {response.status}", unsent=False)
                return (await response.read()).decode("utf-8", "replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise UpstreamLostError(_words(error), unsent=False) from error

    def taken(self) -> None:
        """A request goes there."""
        self.in_flight += 1
        self.last = time.monotonic()

    def done(self) -> None:
        """A request came back, or failed."""
        self.in_flight -= 1
        self.last = time.monotonic()
        if self._on_gone is not None and self.in_flight == 0:
            self._close_soon()
            self._on_gone(self)

    def retire(self, on_gone: Callable[[Upstream], None]) -> None:
        """It is out of the table: closed when its last request has ended, of which `on_gone` is told."""
        if self.in_flight == 0:
            self._close_soon()
        else:
            self._on_gone = on_gone

    def restore(self) -> None:
        """It is in the table again."""
        self._on_gone = None

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _close_soon(self) -> None:
        # Let go of at once: were it to come back into the table, it would get a new session.
        session, self._session = self._session, None
        if session is not None:
            self._closing = asyncio.get_running_loop().create_task(session.close())

    def _open(self) -> aiohttp.ClientSession:
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        connector: aiohttp.BaseConnector
        if "://" in self.address:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
        else:
            connector = aiohttp.UnixConnector(self.address, limit=0, keepalive_timeout=IDLE_S)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            trust_env=False,
            trace_configs=[tracing],
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )
        return self._session

    def _url(self, path: str) -> str:
        return f"{self.address.rstrip('/')}{path}" if "://" in self.address else f"http://runner{path}"


class _LongBody(aiohttp.Payload):
    """A long body as one write: aiohttp would copy it behind the request's head, and warn of its length."""

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self._size = len(body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        writer.send_headers()
        transport = writer.transport
        if transport is None:
            raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
        connection = transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            # The usual 208 KiB would make each piece wait for the runner's turn. (TCP sizes its own buffer.)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        try:
            await writer.write(self._value)
        except asyncio.CancelledError:
            # What is left is for nobody; to close would still send it.
            transport.abort()
            raise


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    request: Any = context.trace_request_ctx
    if request is not None:
        request.reused = True


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
