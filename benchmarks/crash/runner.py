"""A runner without a model, quick to start: answers chat completions within milliseconds, whole or streamed.

Standard library only. Every answer bears another number, so that a repeated one is told from a kept one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any, cast

_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
#: Longest that an answer, or an event of it, takes, seconds.
_THINK_S = 0.006
_EVENTS = 3
_USAGE = {"prompt_tokens": 5, "completion_tokens": _EVENTS, "total_tokens": 5 + _EVENTS}


class Answers(asyncio.Protocol):
    """One connection of a gateway worker: one request after the other."""

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.WriteTransport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(_END)
        if end < 0:
            return
        head = self._buffer[:end]
        length = _LENGTH.search(head)
        whole = end + len(_END) + (int(length[1]) if length else 0)
        if len(self._buffer) < whole:
            return
        body, self._buffer = self._buffer[end + len(_END) : whole], self._buffer[whole:]
        self._task = asyncio.create_task(self._answer(head, body))

    async def _answer(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"POST "):
            self._write(_whole({"status": "ok"}))
            return
        asked = json.loads(body)
        number = f"chatcmpl-{random.getrandbits(64):016x}"
        if not asked.get("stream"):
            await asyncio.sleep(random.uniform(0, _THINK_S))
            message = {"role": "assistant", "content": "Noted."}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._write(
                _whole(
                    {"id": number, "object": "chat.completion", "model": asked["model"]}
                    | {"created": 0, "choices": [choice], "usage": _USAGE}
                )
            )
            return
        self._write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for index in range(_EVENTS):
            await asyncio.sleep(random.uniform(0, _THINK_S))
            choice = {
                "index": 0,
                "delta": {"content": f" {index}"},
                "finish_reason": "stop" if index == _EVENTS - 1 else None,
            }
            event = {"id": number, "object": "chat.completion.chunk", "created": 0, "choices": [choice]}
            self._write(_chunk(f"data: {json.dumps(event | {'model': asked['model']})}\n\n".encode()))
        self._write(_chunk(b"data: [DONE]\n\n") + _chunk(b""))

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


def _whole(data: dict[str, Any]) -> bytes:
    body = json.dumps(data).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + _END + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(socket: str) -> None:
    """Answers on a Unix socket until SIGTERM."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    server = await loop.create_unix_server(Answers, socket)
    try:
        await ended.wait()
    finally:
        server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    os.umask(0o077)
    asyncio.run(serve(json.loads(parser.parse_args().spec.read_text())["socket"]))
    # Connections that gateways keep open are no reason to stay.
    os._exit(0)
