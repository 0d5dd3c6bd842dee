"""A mock of an engine with continuous batching: its time is made up, its order is vLLM's.

Each step has a budget of tokens. Requests that run come first, in the order in which they came: one token
for one that writes its answer, as much of the prompt as the budget leaves for one that is still read. Then
waiting requests are let in, first come, first served, while there is budget and fewer than `max_batch` run
(vLLM's V1 scheduler with chunked prefill and no `long_prefill_token_threshold`). Nothing is interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import msgspec
import uvloop
from aiohttp import web

#: As benchmarks write their prompts.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Speed:
    """How long a step takes: `base_s`, and so much for each token read or written."""

    max_batch: int = 16
    budget: int = 2048
    base_s: float = 0.010
    read_s: float = 0.00004
    write_s: float = 0.0001


@dataclass(eq=False)
class Job:
    """One request: what is still to be read and written, tokens."""

    unread: int
    unwritten: int
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Steps:
    """The engine without a clock."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()

    def step(self) -> tuple[list[Job], float]:
        """One step: the jobs that are done by it, and how long it takes, seconds."""
        speed, left = self._speed, self._speed.budget
        work: list[tuple[Job, int]] = []
        for job in self.running:
            if left:
                tokens = min(left, job.unread or 1)
                work.append((job, tokens))
                left -= tokens
        while left and self.waiting and len(self.running) < speed.max_batch:
            job = self.waiting.popleft()
            self.running.append(job)
            tokens = min(left, job.unread)
            work.append((job, tokens))
            left -= tokens
        read = sum(tokens for job, tokens in work if job.unread)
        written = sum(1 for job, _ in work if not job.unread)
        for job, tokens in work:
            job.unread = max(0, job.unread - tokens)
            # The step that reads the last of a prompt writes the first token.
            job.unwritten -= not job.unread
        done = [job for job in self.running if not job.unread and job.unwritten <= 0]
        self.running = [job for job in self.running if job not in done]
        return done, speed.base_s + read * speed.read_s + written * speed.write_s


class Engine:
    """Steps while there is something to do."""

    def __init__(self, speed: Speed) -> None:
        self._steps = Steps(speed)
        self._news = asyncio.Event()

    async def answer(self, prompt: int, completion: int) -> None:
        """Returns when a request of so many tokens has been answered."""
        steps, job = self._steps, Job(prompt, completion)
        steps.waiting.append(job)
        self._news.set()
        try:
            await job.done.wait()
        finally:
            for jobs in (steps.running, steps.waiting):
                with contextlib.suppress(ValueError):
                    jobs.remove(job)

    async def run(self) -> None:
        steps = self._steps
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if not steps.running and not steps.waiting:
                self._news.clear()
                await self._news.wait()
                due = loop.time()
            done, took_s = steps.step()
            # The steps' own clock, so that a late wake-up does not slow the engine down.
            due = max(due + took_s, loop.time() - 0.05)
            await asyncio.sleep(max(0.0, due - loop.time()))
            for job in done:
                job.done.set()


class _Body(msgspec.Struct):
    max_tokens: int = 64


def _serve(path: str, speed: Speed, on: set[int]) -> None:
    os.sched_setaffinity(0, on)

    async def main() -> None:
        engine = Engine(speed)
        decode = msgspec.json.Decoder(_Body).decode

        async def answer(request: web.Request) -> web.Response:
            body = await request.read()
            prompt, completion = len(body) // BYTES_PER_TOKEN, decode(body).max_tokens
            await engine.answer(prompt, completion)
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
            usage = {"prompt_tokens": prompt, "completion_tokens": completion}
            return web.json_response({"object": "chat.completion", "choices": [choice], "usage": usage})

        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, path).start()
        await engine.run()

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main())


@contextmanager
def mock_engine(path: Path, speed: Speed, on: set[int]) -> Iterator[None]:
    """The engine as a runner on a Unix socket, in a process of its own."""
    process = get_context("spawn").Process(target=_serve, args=(str(path), speed, on))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join(10)
