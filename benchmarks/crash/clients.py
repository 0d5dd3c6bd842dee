"""The callers: keep-alive HTTP clients that write down what they were told, and how each request ended."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.crash.customers import Customer
from benchmarks.crash.serve import MODEL

_TIMEOUT_S = 20.0
#: One client of so many makes requests that are retried.
_RETRYING = 6
_DONE = b"data: [DONE]"


@dataclass
class Outcome:
    """How one request ended for its client.

    sent: there was a connection to send it on. status 0: there was no answer's head. whole: all of the answer
    came.
    """

    sent: bool = False
    status: int = 0
    request_id: str = ""
    charge: int | None = None
    code: str = ""
    digest: str = ""
    whole: bool = False

    @property
    def answered(self) -> bool:
        return self.whole and 200 <= self.status < 300


class Connection:
    """One keep-alive connection to the gateways; opened anew after each break."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, key: str, *, stream: bool, text: str, idempotency_key: str | None) -> Outcome:
        """Sends one chat completion; never raises for what a killed server does."""
        found = Outcome()
        body = json.dumps(
            {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": text}]}
        ).encode()
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            "host: 127.0.0.1",
            "content-type: application/json",
            f"authorization: Bearer {key}",
            f"content-length: {len(body)}",
        ]
        if idempotency_key is not None:
            lines.append(f"idempotency-key: {idempotency_key}")
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                if self._writer is None:
                    self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
                found.sent = True
                self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
                await self._read(found)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            self.close()
        return found

    async def _read(self, found: Outcome) -> None:
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        found.status = int(head[0].split()[1])
        found.request_id = headers.get("x-request-id", "")
        if "x-hearth-charge" in headers:
            found.charge = int(headers["x-hearth-charge"])
        if "content-length" in headers:
            body = await self._reader.readexactly(int(headers["content-length"]))
            found.whole = True
        else:
            body = await self._chunks(found)
        found.digest = hashlib.sha256(body).hexdigest()
        if found.status >= 400:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found.code = str(json.loads(body)["error"]["code"])
        if headers.get("connection") == "close":
            self.close()

    async def _chunks(self, found: Outcome) -> bytes:
        """A chunked body; whole for its client from the stream's last event on."""
        assert self._reader is not None
        body = b""
        while True:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            body += (await self._reader.readexactly(size + 2))[:-2]
            found.whole = found.whole or _DONE in body
            if size == 0:
                return body

    def close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


@dataclass
class Load:
    """A number of clients that ask without end while `going`, each for customers by chance."""

    #: Of each machine; a client stays with one.
    ports: Sequence[int]
    customers: Sequence[Customer]
    clients: int
    #: Mean pause of one client between two requests, seconds.
    pace_s: float
    seed: int
    going: asyncio.Event = field(default_factory=asyncio.Event)
    in_hand: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        self.idle.set()
        retrying = [each for each in self.customers if each.retries]
        others = [each for each in self.customers if not each.retries]
        for number in range(self.clients):
            # Retries take longer: they have clients of their own, so that these do not all wait for them.
            mine = retrying if number % _RETRYING == 0 else others
            chance = random.Random(self.seed * 1000 + number)
            port = self.ports[(number // _RETRYING + number) % len(self.ports)]
            client = self._client(Connection(port), mine or list(self.customers), chance)
            self._tasks.append(asyncio.create_task(client))

    def check(self) -> None:
        """Raises what a client failed with: nothing that a server does makes one fail."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def pause(self) -> None:
        """No further request; returns once those in hand have ended."""
        self.going.clear()
        await self.idle.wait()
        self.check()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(
        self, connection: Connection, customers: Sequence[Customer], chance: random.Random
    ) -> None:
        try:
            while True:
                await self.going.wait()
                self.in_hand += 1
                self.idle.clear()
                try:
                    await serve_one(connection, chance.choice(customers), chance)
                finally:
                    self.in_hand -= 1
                    if not self.in_hand:
                        self.idle.set()
                await asyncio.sleep(chance.uniform(0, 2 * self.pace_s))
        finally:
            connection.close()


async def serve_one(connection: Connection, customer: Customer, chance: random.Random) -> Outcome:
    """One request as this customer makes it, to its end; noted in its book."""
    stream = chance.random() < 0.5
    if not customer.retries:
        found = await connection.ask(
            customer.key, stream=stream, text=f"{chance.random()}", idempotency_key=None
        )
        customer.note(found)
        if found.status in (0, 503):
            # The port is there again in a moment.
            await asyncio.sleep(0.01)
        return found
    operation, text = secrets.token_hex(12), f"{chance.random()}"
    # Some ask once more though they were answered: they are to have the same answer, and pay nothing.
    more = 1 if chance.random() < 0.3 else 0
    while True:
        found = await connection.ask(customer.key, stream=stream, text=text, idempotency_key=operation)
        customer.note_try(operation, found, stream=stream)
        if found.answered:
            if not more:
                return found
            more -= 1
        elif found.status == 503:
            await asyncio.sleep(0.2)
        elif found.status in (0, 409, 429) or found.status >= 500 or not found.whole:
            await asyncio.sleep(0.05)
        else:
            return found
