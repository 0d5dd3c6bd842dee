"""The least of HTTP/1.1 that a benchmark needs, written on asyncio's protocols.

A general client or server would be slower than the gateway and measure itself. These know one request and
one answer, both with a Content-Length.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

_END = b"\r\n\r\n"
#: Longest wait for the last answers after the time is up, seconds.
_PATIENCE_S = 30.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Messages:
    """Counts whole messages in a byte stream and keeps the head of the last."""

    def __init__(self) -> None:
        self.head = b""
        self._buffer = b""
        self._missing = 0

    def feed(self, data: bytes) -> int:
        """How many messages end in ``data``.

        Raises:
            ValueError: a message without Content-Length.
        """
        ended = 0
        while data or self._buffer:
            if self._missing:
                taken = min(self._missing, len(data))
                self._missing -= taken
                data = data[taken:]
                if self._missing:
                    return ended
                ended += 1
                continue
            self._buffer, data = self._buffer + data, b""
            end = self._buffer.find(_END)
            if end < 0:
                return ended
            self.head, data, self._buffer = self._buffer[:end], self._buffer[end + len(_END) :], b""
            length = _LENGTH.search(self.head)
            if length is None:
                raise ValueError(f"no Content-Length in {self.head[:500]!r}")
            self._missing = int(length[1])
            if not self._missing:
                ended += 1
        return ended


class Responder(asyncio.Protocol):
    """A server that gives every request the same answer."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._messages = Messages()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if ended := self._messages.feed(data):
            self._transport.write(self._answer * ended)


@dataclass
class Load:
    """What a closed loop of callers measured."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile_ms(self, share: float) -> float:
        """The latency, milliseconds, that ``share`` of the requests stay within."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Caller(asyncio.Protocol):
    """One connection that sends its request again as soon as it is answered, until told to stop."""

    def __init__(self, request: bytes, load: Load, go_on: Callable[[], bool]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._load = load
        self._go_on = go_on
        self._messages = Messages()
        self._transport: asyncio.WriteTransport | None = None
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        if not self._messages.feed(data):
            return
        self._load.latencies.append(time.perf_counter() - self._sent)
        if b" 200 " not in self._messages.head[:16]:
            self._end(RuntimeError(f"answered {self._messages.head[:300]!r}"))
        elif self._go_on():
            self._send()
        else:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(RuntimeError(f"the connection was closed: {exc}"))

    def _send(self) -> None:
        assert self._transport is not None
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def _end(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
        if self._transport is not None:
            self._transport.close()


def request(path: str, body: bytes, **headers: str) -> bytes:
    """A POST of JSON as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: benchmark", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}"]).encode() + _END + body


async def drive(
    address: Path | tuple[str, int], message: bytes, *, callers: int, seconds: float, most: int
) -> Load:
    """Drives a server with ``callers`` connections for ``seconds`` or ``most`` requests, whichever is first.

    Raises:
        RuntimeError: an answer other than 200, or a connection that was closed.
        TimeoutError: answers that do not come.
    """
    load = Load()
    began = time.perf_counter()

    def go_on() -> bool:
        return len(load.latencies) < most and time.perf_counter() - began < seconds

    loop = asyncio.get_running_loop()

    def make() -> Caller:
        return Caller(message, load, go_on)

    made = []
    for _ in range(callers):
        if isinstance(address, Path):
            made.append((await loop.create_unix_connection(make, str(address)))[1])
        else:
            made.append((await loop.create_connection(make, *address))[1])
    async with asyncio.timeout(seconds + _PATIENCE_S):
        await asyncio.gather(*(caller.done for caller in made))
    load.seconds = time.perf_counter() - began
    return load
