"""The detection runner: ultralytics YOLO behind three request shapes.

``POST /v1/detections`` (JSON or multipart), ``POST /v1/detection`` (LocalAI's shape) and
``POST /v1/chat/completions`` with a picture, whose answer is the JSON list of boxes. ultralytics is AGPL-3.0:
it runs in this process only.

Boxes are in pixels of the picture as a viewer shows it, that is, with its EXIF orientation applied.

Options: ``max_pixels`` (largest picture, default 50 million), and those of :class:`Detector`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, cast

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.runners.base import Runner, endpoint, serve
from engine.runners.batching import Work
from engine.runners.detection_answer import Found, as_chunks, as_completion, as_list, as_localai
from engine.runners.detection_model import Detector, Picture, decode_picture, shared_shape
from engine.runners.detection_request import (
    DetectionRequest,
    Filters,
    Names,
    from_chat,
    from_form,
    from_json,
    from_localai,
)
from engine.runners.endpoints import MAX_BODY_BYTES, EventStream, read_json
from engine.runners.spec import RunnerSpec

DEFAULT_MAX_PIXELS = 50_000_000

Parse = Callable[[dict[str, Any], Names], Any]


class Detects(Protocol):
    """What this runner needs of a detection model; see :class:`Detector`."""

    @property
    def names(self) -> Names: ...

    @property
    def keep(self) -> int: ...

    def predict(self, pictures: Sequence[Picture], filters: Filters) -> list[Found]: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class DetectionEngine:
    """Serves one detection model."""

    def __init__(self, spec: RunnerSpec, make: Callable[[RunnerSpec], Detects] = Detector) -> None:
        self._spec = spec
        self._make = make
        self._max_pixels = int(spec.options.get("max_pixels", DEFAULT_MAX_PIXELS))
        self._detector: Detects

    def load(self) -> None:
        self._detector = self._make(self._spec)

    def sleep(self) -> None:
        self._detector.sleep()

    def wake(self) -> None:
        self._detector.wake()

    def routes(self, runner: Runner) -> list[Route]:
        batcher = runner.batcher(self.run)

        async def find(asked: DetectionRequest) -> Found:
            picture = await runner.offload(self._decode, asked)
            found = await batcher.submit((asked.filters, shared_shape(picture)), picture)
            return cast(Found, found)

        async def read(request: Request, parse: Parse) -> Any:
            data = await read_json(request)
            runner.check_model(data.get("model"))
            # Base64 of a large picture takes a while too.
            return await runner.offload(parse, data, self._detector.names)

        async def detections(request: Request) -> Response:
            if request.headers.get("content-type", "").startswith("multipart/form-data"):
                fields = await _form(request)
                runner.check_model(_model(fields))
                asked = await runner.offload(from_form, fields, self._detector.names)
            else:
                asked = await read(request, from_json)
            return JSONResponse(as_list(await find(asked), asked.model))

        async def localai(request: Request) -> Response:
            return JSONResponse(as_localai(await find(await read(request, from_localai))))

        async def chat(request: Request) -> Response:
            asked = await read(request, from_chat)
            found = await find(asked.detection)
            facts: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
            model = asked.detection.model
            if not asked.stream:
                return JSONResponse(as_completion(found, model, **facts))
            chunks = as_chunks(found, model, **facts, include_usage=asked.include_usage)
            return EventStream(_in_turn(chunks))

        return [
            Route("/v1/detections", endpoint(detections), methods=["POST"]),
            Route("/v1/detection", endpoint(localai), methods=["POST"]),
            Route("/v1/chat/completions", endpoint(chat), methods=["POST"]),
        ]

    def run(self, key: Hashable, works: list[Work[Picture]]) -> list[Found | Exception]:
        """Runs pictures of one shape with equal filters together; called in the batcher's thread."""
        filters, _ = cast(tuple[Filters, object], key)
        wanted = [work for work in works if not work.cancelled.is_set()]
        found = self._detector.predict([work.item for work in wanted], filters) if wanted else []
        of = dict(zip(map(id, wanted), found, strict=True))
        # What is given for a cancelled work is dropped.
        return [of.get(id(work), _NOTHING) for work in works]

    def _decode(self, asked: DetectionRequest) -> Picture:
        return decode_picture(
            asked.image, max_pixels=self._max_pixels, keep=self._detector.keep, param=asked.param
        )


_NOTHING = Found((), 0, 0, 0)


async def _form(request: Request) -> dict[str, list[str | bytes]]:
    # A picture may also come as a data URL in a plain field; the body as a whole is bounded already.
    form = await request.form(max_part_size=MAX_BODY_BYTES)
    return {
        key: [await part.read() if isinstance(part, UploadFile) else part for part in form.getlist(key)]
        for key in form
    }


def _model(fields: dict[str, list[str | bytes]]) -> str | None:
    name = fields.get("model", [None])[-1]
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


async def _in_turn(events: Iterator[bytes]) -> AsyncIterator[bytes]:
    for one in events:
        yield one


if __name__ == "__main__":
    serve(DetectionEngine)
