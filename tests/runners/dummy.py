"""A runner without weights, started as a real process by the tests of the base."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Hashable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.errors import bad_request
from engine.runners.base import Runner, endpoint, serve
from engine.runners.batching import Batcher, Work
from engine.runners.endpoints import DONE, EventStream, event, read_json
from engine.runners.spec import RunnerSpec


class Dummy:
    """Answers with the length of a text; some texts make it slow, cross or forgetful."""

    def __init__(self, spec: RunnerSpec) -> None:
        self.spec = spec
        self.batcher: Batcher[Any, Any]

    def load(self) -> None:
        gate = self.spec.options.get("wait_for")
        while gate and not Path(gate).exists():
            time.sleep(0.01)
        if self.spec.options.get("broken"):
            raise RuntimeError("weights.bin is missing; run the preparation again")

    def run(self, key: Hashable, works: list[Work[Any]]) -> list[Any]:
        answers: list[Any] = []
        for work in works:
            text = work.item["text"]
            if text == "cross":
                raise RuntimeError("secret detail")
            if text.startswith("slow"):
                started = Path(work.item["mark"] + ".started")
                started.touch()
                until = time.monotonic() + work.item.get("seconds", 20)
                while time.monotonic() < until and not work.cancelled.wait(0.01):
                    work.emit("tick")
                if work.cancelled.is_set():
                    Path(work.item["mark"] + ".cancelled").touch()
            for letter in text:
                work.emit(letter)
            if text.endswith("!"):
                raise RuntimeError("secret detail")
            answers.append(
                {"length": len(text), "together": len(works), "threads": os.environ["OMP_NUM_THREADS"]}
            )
        return answers

    def routes(self, runner: Runner) -> list[Route]:
        self.batcher = runner.batcher(self.run)

        async def length(request: Request) -> Response:
            data = await read_json(request)
            runner.check_model(data.get("model"))
            if "text" not in data:
                raise bad_request("Missing required field 'text'.", param="text", code="missing_field")
            if not data.get("stream"):
                return JSONResponse(await self.batcher.submit("", data))

            emitted = self.batcher.stream("", data)

            async def events() -> AsyncIterator[bytes]:
                try:
                    async for thing in emitted:
                        yield event({"delta": thing})
                    yield DONE
                finally:
                    await emitted.aclose()

            return EventStream(events())

        return [Route("/v1/length", endpoint(length), methods=["POST"])]


if __name__ == "__main__":
    serve(Dummy)
