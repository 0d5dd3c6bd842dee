"""The image runner around a painter without weights: answers, streams, batches, errors, gone clients."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

from engine.errors import ApiError
from engine.runners.base import Runner, make_app
from engine.runners.batching import Work
from engine.runners.image import Finished, ImageEngine, Job, preview_steps
from engine.runners.image_pipeline import Manner, OnStep, Picture
from engine.runners.image_request import Abilities
from engine.runners.image_size import Limits, Size
from engine.runners.spec import RunnerSpec

PATH = "/v1/images/generations"


class Painter:
    """Paints plain pictures whose red channel is the seed; remembers its batches."""

    abilities = Abilities(
        limits=Limits(default=Size(128, 128), multiple_of=16, native_side=64),
        steps=6,
        max_steps=20,
        guidance=4.0,
    )
    pixels_a_token = 64

    def __init__(self) -> None:
        self.batches: list[tuple[list[Picture], Manner]] = []
        self.steps = 0

    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split())

    def paint(self, pictures: Sequence[Picture], manner: Manner, on_step: OnStep) -> list[Image.Image]:
        self.batches.append((list(pictures), manner))
        if any(picture.prompt == "fail" for picture in pictures):
            raise RuntimeError("secret detail")
        size = (manner.size.width, manner.size.height)
        for step in range(manner.steps):
            self.steps += 1
            on_step(step, lambda: [Image.new("RGB", size, "grey") for _ in pictures])
        return [Image.new("RGB", size, (picture.seed % 256, 0, 0)) for picture in pictures]


def make_spec(**over: Any) -> RunnerSpec:
    facts: dict[str, Any] = {
        "model": "tiny-image",
        "aliases": ["pictures"],
        "category": "image",
        "engine": "diffusers",
        "model_dir": Path("nowhere"),
        "socket": Path("unused.sock"),
        "max_batch": 4,
        "max_wait_ms": 10,
    }
    return RunnerSpec.model_validate(facts | over)


@pytest.fixture
def painter() -> Painter:
    return Painter()


@pytest.fixture
def client(painter: Painter) -> Iterator[TestClient]:
    spec = make_spec()
    app = make_app(ImageEngine(spec, lambda _: painter), Runner(spec))
    with TestClient(app) as client:
        while client.get("/health").status_code != 200:
            pass
        yield client


def red_of(row: dict[str, Any]) -> int:
    picture = Image.open(io.BytesIO(base64.b64decode(row["b64_json"])))
    return int(np.asarray(picture)[0, 0, 0])


def test_a_request_for_one_picture(client: TestClient, painter: Painter) -> None:
    answer = client.post(PATH, json={"model": "tiny-image", "prompt": "a red circle", "seed": 9}).json()
    assert [red_of(row) for row in answer["data"]] == [9]
    assert answer["created"] > 1_700_000_000
    assert answer["usage"]["input_tokens"] == 3
    assert answer["usage"]["output_tokens"] == 64
    assert painter.batches == [
        ([Picture("a red circle", None, 9)], Manner(Size(64, 64), 6, 4.0, with_negative=False))
    ]


def test_ten_pictures_have_ten_seeds_and_run_in_batches(client: TestClient, painter: Painter) -> None:
    answer = client.post(PATH, json={"model": "pictures", "prompt": "a", "n": 10, "seed": 20}).json()
    assert [row["seed"] for row in answer["data"]] == list(range(20, 30))
    assert [red_of(row) for row in answer["data"]] == list(range(20, 30))
    assert [len(pictures) for pictures, _ in painter.batches] == [4, 4, 2]


def test_without_a_seed_each_request_has_another(client: TestClient) -> None:
    seeds = {
        client.post(PATH, json={"model": "tiny-image", "prompt": "a"}).json()["data"][0]["seed"]
        for _ in range(3)
    }
    assert len(seeds) == 3


def test_a_picture_has_exactly_the_size_asked_for(client: TestClient) -> None:
    answer = client.post(PATH, json={"model": "tiny-image", "prompt": "a", "size": "300x200"}).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert picture.size == (300, 200)
    assert (answer["size"], answer["painted_size"]) == ("300x200", "96x64")


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_stream_shows_previews_and_then_the_picture(client: TestClient) -> None:
    body = {"model": "tiny-image", "prompt": "a", "seed": 5, "stream": True, "partial_images": 2}
    answer = client.post(PATH, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [name for name, _ in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert all(name == data["type"] for name, data in events)
    assert [data.get("partial_image_index") for _, data in events] == [0, 1, None]
    assert red_of(events[0][1]) == 128
    assert red_of(events[-1][1]) == 5
    assert events[-1][1]["usage"]["total_tokens"] == 65


def test_a_stream_without_previews_is_one_event(client: TestClient) -> None:
    answer = client.post(PATH, json={"model": "tiny-image", "prompt": "a", "stream": True})
    assert [name for name, _ in events_of(answer.text)] == ["image_generation.completed"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": "a"}, 400, "missing_field"),
        ({"model": "tiny-image"}, 400, "missing_field"),
        ({"model": "dall-e-9", "prompt": "a"}, 404, "model_not_found"),
        ({"model": "tiny-image", "prompt": "a", "size": "9x9"}, 400, "invalid_size"),
        ({"model": "tiny-image", "prompt": "a", "stream": True, "size": "9x9"}, 400, "invalid_size"),
        ({"model": "tiny-image", "prompt": "fail"}, 500, "internal_error"),
        ({"model": "tiny-image", "prompt": "fail", "stream": True}, 500, "internal_error"),
    ],
)
def test_a_failure_is_an_envelope(client: TestClient, body: dict[str, Any], status: int, code: str) -> None:
    answer = client.post(PATH, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert "secret" not in error["message"]


def test_pictures_of_different_steps_never_share_a_batch(client: TestClient, painter: Painter) -> None:
    def ask(steps: int) -> None:
        client.post(PATH, json={"model": "tiny-image", "prompt": "a", "steps": steps})

    threads = [threading.Thread(target=ask, args=(3 + number % 2,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(pictures) for pictures, _ in painter.batches) == 8
    assert {manner.steps for _, manner in painter.batches} == {3, 4}


def loaded(painter: Painter) -> ImageEngine:
    engine = ImageEngine(make_spec(), lambda _: painter)
    engine.load()
    return engine


MANNER = Manner(Size(64, 64), 6, None, with_negative=False)


def works(*seeds: int, previews: frozenset[int] = frozenset()) -> list[Work[Job]]:
    return [Work(Job(Picture("a", None, seed), previews)) for seed in seeds]


def test_painting_stops_between_steps_once_all_clients_have_gone(painter: Painter) -> None:
    batch = works(1, 2, previews=frozenset({1}))
    for work in batch:
        work.emit = lambda _, work=work: work.cancelled.set()
    results = loaded(painter).run(MANNER, batch)
    assert [type(result) for result in results] == [ApiError, ApiError]
    assert painter.steps == 3
    assert len(painter.batches) == 1


def test_one_gone_client_does_not_stop_the_others(painter: Painter) -> None:
    batch = works(1, 2, 3)
    batch[1].cancelled.set()
    one, gone, three = loaded(painter).run(MANNER, batch)
    assert isinstance(gone, ApiError)
    assert isinstance(one, Image.Image) and one.getpixel((0, 0)) == (1, 0, 0)
    assert isinstance(three, Image.Image) and three.getpixel((0, 0)) == (3, 0, 0)
    assert [len(pictures) for pictures, _ in painter.batches] == [2]


def test_nothing_is_painted_for_nobody(painter: Painter) -> None:
    batch = works(1)
    batch[0].cancelled.set()
    loaded(painter).run(MANNER, batch)
    assert painter.batches == []


def test_only_who_asked_sees_previews(painter: Painter) -> None:
    plain, curious = works(1), works(2, previews=frozenset({0, 3}))
    seen: dict[int, list[Any]] = {0: [], 1: []}
    batch = [*plain, *curious]
    for number, work in enumerate(batch):
        work.emit = seen[number].append
    loaded(painter).run(MANNER, batch)
    assert [type(thing) for thing in seen[0]] == [Finished]
    assert [type(thing) for thing in seen[1]] == [Image.Image, Image.Image, Finished]


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(12, 0, set()), (12, 1, {5}), (12, 2, {3, 7}), (12, 3, {2, 5, 8}), (1, 3, set()), (2, 3, {0})],
)
def test_previews_are_evenly_spread_and_never_the_last_step(
    steps: int, count: int, expected: set[int]
) -> None:
    assert preview_steps(steps, count) == expected


def test_the_openai_client_reads_answers_and_streams(client: TestClient) -> None:
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
    answer = api.images.generate(model="tiny-image", prompt="a red circle", n=2, size="256x256")
    assert answer.data is not None and len(answer.data) == 2
    assert answer.usage is not None and answer.usage.total_tokens == 3 + 128
    events = list(
        api.images.generate(model="tiny-image", prompt="a red circle", stream=True, partial_images=1)
    )
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.generate(model="tiny-image", prompt="a", size="256x256", background="transparent")
    assert (caught.value.param, caught.value.code) == ("background", "unsupported_parameter")


def test_more_pictures_than_the_queue_holds_are_refused_as_a_whole(painter: Painter) -> None:
    spec = make_spec(max_queue=3, max_batch=1, max_wait_ms=0)
    with TestClient(make_app(ImageEngine(spec, lambda _: painter), Runner(spec))) as client:
        while client.get("/health").status_code != 200:
            pass
        answer = client.post(PATH, json={"model": "tiny-image", "prompt": "a", "n": 10})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert client.post(PATH, json={"model": "tiny-image", "prompt": "a", "n": 3}).status_code == 200
    assert sum(len(pictures) for pictures, _ in painter.batches) <= 4 + 3
