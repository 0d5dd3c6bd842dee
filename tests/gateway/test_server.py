"""How request bodies are read from the connection: whole, bounded, and not before they are wanted."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from engine.gateway.server import Protocol, Server, make_server
from tests.gateway.dummy import DummyRunner, House, until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LONG = bytes(range(256)) * 4096 * 4
LIMIT = 2 * len(LONG)
_JSON = {"content-type": "application/json"}


class Reader:
    """An application that notes the messages of each body and answers with its length."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.may_ask = asyncio.Event()
        self.may_ask.set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.refuse = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        await self.may_ask.wait()
        size = 0
        more = not self.refuse
        while more:
            message = await receive()
            self.messages.append(message)
            size += len(message.get("body", b""))
            more = message.get("more_body", False) and size <= LIMIT
        if size > LIMIT:
            self.refuse = True
        await self.may_answer.wait()
        answer = b"no" if self.refuse else b"%d" % size
        await send(
            {
                "type": "http.response.start",
                "status": 401 if self.refuse else 200,
                "headers": [(b"content-length", b"%d" % len(answer))],
            }
        )
        await send({"type": "http.response.body", "body": answer})

    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages]


class Place:
    """The application behind our server, and connections to it."""

    def __init__(self, app: Reader, server: Server, port: int) -> None:
        self.app = app
        self._server = server
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> Streams:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.append(writer)
        await until(lambda: self._server.server_state.connections)
        return reader, writer

    def protocol(self) -> Protocol:
        (only,) = self._server.server_state.connections
        assert isinstance(only, Protocol)
        return only

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()
        for each in self._server.servers:
            each.close()
        await until(lambda: not self._server.server_state.connections)
        await self._server.lifespan.shutdown()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    app = Reader()
    config = Config(state_dir=tmp_path, gateway={"max_body_bytes": LIMIT})
    server = make_server(config, app)
    listener = socket.create_server(("127.0.0.1", 0))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[listener])
    opened = Place(app, server, listener.getsockname()[1])
    yield opened
    await opened.close()


def head(length: int | None, *more: str) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join(["POST / HTTP/1.1", "Host: here", size, *more, "", ""]).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    async with asyncio.timeout(5):
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        size = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        return int(lines[0].split()[1]), await reader.readexactly(size)


async def test_a_long_body_is_one_message(place: Place) -> None:
    reader, writer = await place.connect()
    for _ in range(2):
        writer.write(head(len(LONG)) + LONG)
        assert await answer(reader) == (200, b"%d" % len(LONG))
    assert place.app.bodies() == [LONG, LONG]
    # Nothing of it stays with an idle connection.
    assert place.protocol()._body is None and place.protocol().cycle.body == b""


async def test_a_chunked_body_is_one_message(place: Place) -> None:
    reader, writer = await place.connect()
    pieces = [LONG[at : at + 100_000] for at in range(0, len(LONG), 100_000)]
    writer.write(head(None))
    for piece in [*pieces, b""]:
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    assert await answer(reader) == (200, b"%d" % len(LONG))
    assert place.app.bodies() == [LONG]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_handed_over_before_its_end(place: Place, announced: bool) -> None:
    reader, writer = await place.connect()
    pieces = [LONG] * 6
    writer.write(head(len(LONG) * len(pieces) if announced else None))
    for piece in pieces:
        writer.write(piece if announced else b"%x\r\n%b\r\n" % (len(piece), piece))
    assert (await answer(reader))[0] == 401
    assert LIMIT < len(place.app.bodies()[0]) < LIMIT + 1_000_000
    assert place.app.messages[0]["more_body"]
    # The rest is read and dropped, and the connection serves on.
    writer.write(b"" if announced else b"0\r\n\r\n")
    place.app.refuse = False
    writer.write(head(3) + b"abc")
    assert await answer(reader) == (200, b"3")
    assert place.app.bodies()[1:] == [b"abc"]


async def test_little_is_read_before_the_application_asks(place: Place) -> None:
    place.app.may_ask.clear()
    reader, writer = await place.connect()
    writer.write(head(len(LONG)) + LONG)
    await until(lambda: place.protocol().flow.read_paused)
    body = place.protocol()._body
    assert body is not None and body.tell() < 400_000
    place.app.may_ask.set()
    assert await answer(reader) == (200, b"%d" % len(LONG))
    assert place.app.bodies() == [LONG]


async def test_an_answer_before_the_body_drops_it(place: Place) -> None:
    place.app.refuse = True
    reader, writer = await place.connect()
    writer.write(head(len(LONG)) + LONG[:100_000])
    assert await answer(reader) == (401, b"no")
    await until(lambda: place.protocol().cycle.response_complete)
    assert place.protocol()._body is None
    place.app.refuse = False
    writer.write(LONG[100_000:] + head(2) + b"ok")
    assert await answer(reader) == (200, b"2")
    assert place.app.bodies() == [b"ok"]


async def test_pipelined_requests_keep_their_bodies(place: Place) -> None:
    place.app.may_answer.clear()
    reader, writer = await place.connect()
    second = head(len(LONG), "X-Padding: " + "p" * 2000)
    # The first answer goes out while the second request is somewhere between its first and last byte.
    for cut in (1, 30, len(second), len(second) + 50_000, len(second) + 200_000):
        place.app.may_answer.clear()
        place.app.messages.clear()
        writer.write(head(5) + b"first" + (second + LONG)[:cut])
        await until(lambda: place.app.messages)
        place.app.may_answer.set()
        assert await answer(reader) == (200, b"5")
        writer.write((second + LONG)[cut:])
        assert await answer(reader) == (200, b"%d" % len(LONG))
        assert place.app.bodies() == [b"first", LONG]


async def test_a_client_that_waits_for_the_word_to_go_on_gets_it(place: Place) -> None:
    reader, writer = await place.connect()
    writer.write(head(len(LONG), "Expect: 100-continue"))
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(LONG)
    assert await answer(reader) == (200, b"%d" % len(LONG))


async def test_a_client_that_leaves_while_it_sends_is_told_of(place: Place) -> None:
    _, writer = await place.connect()
    writer.write(head(len(LONG)) + LONG[:200_000])
    await until(lambda: place.protocol()._flow.asked)
    writer.close()
    await until(lambda: place.app.messages)
    assert place.app.messages == [{"type": "http.disconnect"}]


async def test_a_client_that_leaves_takes_the_rest_of_its_body_along(
    house: House, runner: DummyRunner
) -> None:
    """What the runner has not read of a cancelled request is not sent to it any more."""
    go_on = asyncio.Event()
    whole: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def stalled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        size = 0
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 20):
                size += len(part)
        writer.close()
        whole.set_result(size)

    body = b'{"model": "dummy", "messages": "%b"}' % (b"word " * 8_000_000)
    replica = house.gateway.directory.find("dummy").upstreams[0]
    await runner.stop()
    async with await asyncio.start_unix_server(stalled, runner.path):
        asking = asyncio.create_task(house.post("/v1/chat/completions", data=body, headers=_JSON))
        await until(lambda: replica.in_flight == 1)
        await asyncio.sleep(0.05)
        asking.cancel()
        await until(lambda: replica.in_flight == 0)
        go_on.set()
        async with asyncio.timeout(5):
            assert await whole < len(body) / 2
