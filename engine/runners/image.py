"""The image runner: a diffusers pipeline behind ``POST /v1/images/generations``.

Each picture of a request is one work of the batcher, so pictures of several requests are painted together
when they share size, steps and guidance, and a request for ten is painted ``max_batch`` at a time. Painting
stops between two steps once every client of a batch has gone.

``response_format: "url"`` gives a ``data:`` URL: a runner keeps no files. Options: :class:`ImageOptions`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.errors import ApiError
from engine.runners import image_request
from engine.runners.base import Runner, endpoint, serve
from engine.runners.batching import Batcher, Work
from engine.runners.endpoints import EventStream, event, read_json
from engine.runners.image_pipeline import Manner, OnStep, Picture, load_painter
from engine.runners.image_request import Abilities, Asked
from engine.runners.spec import RunnerSpec

Event = dict[str, Any]


class Paints(Protocol):
    """What this runner needs of a pipeline; see :class:`engine.runners.image_pipeline.Painter`."""

    @property
    def abilities(self) -> Abilities: ...

    @property
    def pixels_a_token(self) -> int: ...

    def count_tokens(self, prompt: str) -> int: ...

    def paint(self, pictures: Sequence[Picture], manner: Manner, on_step: OnStep) -> list[Image.Image]: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """One picture in the queue. ``previews`` are the steps (from 0) after which it is shown as it stands."""

    picture: Picture
    previews: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Finished:
    """The last thing that a streamed work emits; the pictures before it are previews."""

    picture: Image.Image


class _AllGoneError(Exception):
    """Every client of the batch has gone."""


class ImageEngine:
    """Serves one text-to-image model."""

    def __init__(self, spec: RunnerSpec, make: Callable[[RunnerSpec], Paints] = load_painter) -> None:
        self._spec = spec
        self._make = make
        self._painter: Paints

    def load(self) -> None:
        self._painter = self._make(self._spec)

    def sleep(self) -> None:
        self._painter.sleep()

    def wake(self) -> None:
        self._painter.wake()

    def routes(self, runner: Runner) -> list[Route]:
        batcher = runner.batcher(self.run)

        async def generations(request: Request) -> Response:
            data = await read_json(request)
            runner.check_model(data.get("model"))
            asked = image_request.parse(data, self._painter.abilities)
            if asked.stream:
                return EventStream(self._events(asked, runner, batcher))
            return JSONResponse(await self._answer(asked, runner, batcher))

        return [Route("/v1/images/generations", endpoint(generations), methods=["POST"])]

    def run(self, manner: Hashable, works: list[Work[Job]]) -> list[Image.Image | Exception]:
        """Paints a batch; called in the batcher's thread."""
        assert isinstance(manner, Manner)
        gone = ApiError(499, "The client has gone.")
        wanted = [work for work in works if not work.cancelled.is_set()]

        def on_step(step: int, preview: Callable[[], list[Image.Image] | None]) -> None:
            if all(work.cancelled.is_set() for work in wanted):
                raise _AllGoneError
            if not any(step in work.item.previews for work in wanted):
                return
            for work, picture in zip(wanted, preview() or (), strict=False):
                if step in work.item.previews:
                    work.emit(picture)

        if not wanted:
            return [gone for _ in works]
        try:
            painted = iter(self._painter.paint([work.item.picture for work in wanted], manner, on_step))
        except _AllGoneError:
            return [gone for _ in works]
        chosen = set(map(id, wanted))  # not asked again: one may have been cancelled meanwhile
        results: list[Image.Image | Exception] = [
            next(painted) if id(work) in chosen else gone for work in works
        ]
        for work, result in zip(works, results, strict=True):
            if isinstance(result, Image.Image):
                work.emit(Finished(result))
        return results

    async def _answer(self, asked: Asked, runner: Runner, batcher: Batcher[Job, Image.Image]) -> Event:
        jobs = _jobs(asked)

        async def one(job: Job) -> str:
            painted = await batcher.submit(_manner(asked), job)
            return await runner.offload(image_request.encode, painted, asked)

        tasks = [asyncio.create_task(one(job)) for job in jobs]
        try:
            pictures = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # those that a failure or a gone client has left
                task.cancel()
        seeds = [job.picture.seed for job in jobs]
        return image_request.answer(asked, pictures, seeds, await self._usage(asked, runner))

    async def _events(self, asked: Asked, runner: Runner, batcher: Batcher[Job, Any]) -> AsyncIterator[bytes]:
        job = _jobs(asked, previews=preview_steps(asked.steps, asked.partial_images))[0]
        emitted = batcher.stream(_manner(asked), job)
        index = 0
        try:
            async for thing in emitted:
                painted = thing.picture if isinstance(thing, Finished) else thing
                picture = await runner.offload(image_request.encode, painted, asked)
                if isinstance(thing, Finished):
                    used = await self._usage(asked, runner)
                    yield _event(image_request.completed_event(asked, picture, job.picture.seed, used))
                else:
                    yield _event(image_request.partial_event(asked, picture, index))
                    index += 1
        finally:
            await emitted.aclose()

    async def _usage(self, asked: Asked, runner: Runner) -> Event:
        tokens = await runner.offload(self._painter.count_tokens, asked.prompt)
        return image_request.usage(tokens, asked.plan.painted, asked.n, self._painter.pixels_a_token)


def preview_steps(steps: int, count: int) -> frozenset[int]:
    """After which steps (from 0) ``count`` previews are shown, evenly spread and never after the last."""
    return frozenset(
        min(steps - 2, max(0, round(steps * (i + 1) / (count + 1)) - 1)) for i in range(count) if steps > 1
    )


def _jobs(asked: Asked, previews: frozenset[int] = frozenset()) -> list[Job]:
    """One job a picture; the first has the seed that was asked for, each further one the next."""
    first = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    seeds = ((first + i) % 2**63 for i in range(asked.n))
    return [Job(Picture(asked.prompt, asked.negative, seed), previews) for seed in seeds]


def _manner(asked: Asked) -> Manner:
    return Manner(asked.plan.painted, asked.steps, asked.guidance, asked.negative is not None)


def _event(data: Event) -> bytes:
    """A server-sent event with its type as name, as OpenAI sends them for pictures."""
    return f"event: {data['type']}\n".encode() + event(data)


if __name__ == "__main__":
    serve(ImageEngine)
