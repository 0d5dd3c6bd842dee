"""The detection runner: its three request shapes, with a detector without weights."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from engine.runners.base import Runner, make_app
from engine.runners.detection import DetectionEngine
from engine.runners.detection_answer import Detection, Found
from engine.runners.detection_library import find_weights
from engine.runners.detection_model import Picture, decode_picture
from engine.runners.detection_request import Filters, class_ids
from engine.runners.spec import RunnerSpec

NAMES = {0: "person", 2: "car", 5: "bus", 11: "stop sign", 27: "tie"}


class RedFinder:
    """Finds the red pixels' bounding box, as a bus of 90 %, and the whole picture, as a person of 40 %."""

    names = NAMES
    keep = 100

    def __init__(self) -> None:
        self.calls: list[tuple[int, Filters, tuple[int, ...]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def predict(self, pictures: Sequence[Picture], filters: Filters) -> list[Found]:
        assert self.gate.wait(10)
        shapes = {picture.pixels.shape for picture in pictures}
        assert len(shapes) == 1
        self.calls.append((len(pictures), filters, shapes.pop()))
        return [self._find(picture, filters) for picture in pictures]

    def _find(self, picture: Picture, filters: Filters) -> Found:
        down, across = np.nonzero(picture.pixels[..., 2] > 200)  # BGR
        scale = picture.scale
        every = [Detection("person", 0, 0.4, 0, 0, picture.width, picture.height)]
        if len(down):
            box = (
                across.min() * scale,
                down.min() * scale,
                across.max() * scale + scale,
                down.max() * scale + scale,
            )
            every.insert(0, Detection("bus", 5, 0.9, *map(float, box)))
        chosen = [
            one
            for one in every
            if one.confidence >= filters.confidence
            and (filters.classes is None or one.class_id in filters.classes)
        ]
        return Found(chosen[: filters.max_detections], picture.width, picture.height, cells=12)


class Served:
    """The runner's app around the detector."""

    def __init__(self, client: TestClient, detector: RedFinder) -> None:
        self.client, self.detector = client, detector

    def ask(self, path: str = "/v1/detections", **body: Any) -> Any:
        answer = self.client.post(path, json={"model": "yolo", **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refusal(self, body: Any, path: str = "/v1/detections", **options: Any) -> tuple[int, str, str]:
        kind = options or {"json": {"model": "yolo", **body}}
        answer = self.client.post(path, **kind)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["code"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    spec = RunnerSpec(
        model="yolo",
        category="detection",
        engine="ultralytics",
        model_dir=tmp_path,
        socket=tmp_path / "s",
        max_batch=4,
        max_wait_ms=0,
        options={"max_pixels": 100_000},
    )
    detector = RedFinder()
    with TestClient(make_app(DetectionEngine(spec, lambda _: detector), Runner(spec))) as client:
        while client.get("/health").status_code != 200:
            pass
        yield Served(client, detector)


def drawn(width: int = 60, height: int = 40, red: tuple[int, int, int, int] = (10, 5, 30, 20)) -> bytes:
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", red)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


BUS = {
    "label": "bus",
    "class_id": 5,
    "confidence": 0.9,
    "box": {"x1": 10.0, "y1": 5.0, "x2": 30.0, "y2": 20.0},
}
PERSON = {
    "label": "person",
    "class_id": 0,
    "confidence": 0.4,
    "box": {"x1": 0, "y1": 0, "x2": 60, "y2": 40},
}


def test_detections_as_json(served: Served) -> None:
    assert served.ask(image=url(drawn())) == {
        "object": "list",
        "model": "yolo",
        "data": [BUS, PERSON],
        "image": {"width": 60, "height": 40},
    }
    assert served.detector.calls == [(1, Filters(0.25, 0.7, 300, None), (40, 60, 3))]


def test_the_filters_reach_the_model(served: Served) -> None:
    image = url(drawn())
    assert served.ask(image=image, confidence=0.5)["data"] == [BUS]
    assert served.ask(image=image, classes=["Person"])["data"] == [PERSON]
    assert served.ask(image=image, classes=[5, "0"])["data"] == [BUS, PERSON]
    assert served.ask(image=image, classes="bus")["data"] == [BUS]
    assert served.ask(image=image, max_detections=1, iou=0.3)["data"] == [BUS]
    assert served.detector.calls[-1][1] == Filters(0.25, 0.3, 1, None)
    assert served.ask(image=image, confidence=None, classes=None)["data"] == [BUS, PERSON]


def test_detections_as_a_form(served: Served) -> None:
    files = {"image": ("a.png", drawn(), "image/png")}

    def ask(**fields: Any) -> Any:
        answer = served.client.post("/v1/detections", data={"model": "yolo", **fields}, files=files)
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert ask() == served.ask(image=url(drawn()))
    assert ask(confidence="0.5", iou="0.3", max_detections="7")["data"] == [BUS]
    assert served.detector.calls[-1][1] == Filters(0.5, 0.3, 7, None)
    for classes in ("bus,stop sign", "5,11", '["bus", 11]', ["bus", "stop sign"]):
        assert ask(classes=classes)["data"] == [BUS]
        assert served.detector.calls[-1][1].classes == (5, 11)
    # A picture may also stand in a plain field.
    answer = served.client.post(
        "/v1/detections", files={"model": (None, "yolo"), "image": (None, url(drawn()))}
    )
    assert answer.json()["data"] == [BUS, PERSON]


def test_localais_shape(served: Served) -> None:
    for image in (url(drawn()), base64.b64encode(drawn()).decode()):
        assert served.ask("/v1/detection", image=image, threshold=0.5) == {
            "detections": [
                {"x": 10, "y": 5, "width": 20, "height": 15, "confidence": 0.9, "class_name": "bus"}
            ]
        }
    assert len(served.ask("/v1/detection", image=url(drawn()), threshold=0)["detections"]) == 2
    assert served.refusal({"image": "x" * 40, "threshold": 2}, "/v1/detection")[1] in ("image", "threshold")
    assert served.refusal({"image": url(drawn()), "threshold": 2}, "/v1/detection")[1] == "threshold"


def chat(image: Any = None, **more: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": image or url(drawn())}}
    content = [{"type": "text", "text": "What is here?"}, part]
    return {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": content}], **more}


def test_a_chat_completion_holds_the_list_of_boxes(served: Served) -> None:
    answer = served.ask("/v1/chat/completions", **chat(response_format={"type": "json_object"}, n=1))
    assert answer["object"] == "chat.completion" and answer["model"] == "yolo"
    assert answer["id"].startswith("chatcmpl-") and answer["created"] > 1_700_000_000
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["role"] == "assistant"
    assert json.loads(choice["message"]["content"]) == [BUS, PERSON]
    assert answer["usage"] == {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14}
    none = served.ask("/v1/chat/completions", **chat(confidence=0.99))
    assert none["choices"][0]["message"]["content"] == "[]"


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_chat_completion_is_the_same(served: Served, usage: bool) -> None:
    body = chat(stream=True, stream_options={"include_usage": usage})
    answer = served.client.post("/v1/chat/completions", json={"model": "yolo", **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(one.removeprefix("data: ")) for one in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14}
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert json.loads("".join(one["delta"].get("content", "") for one in deltas)) == [BUS, PERSON]
    assert [one["finish_reason"] for one in deltas] == [None] * (len(deltas) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "image", "missing_field"),
        ({"image": 5}, "image", "invalid_value"),
        ({"image": "data:image/png;base64,"}, "image", "empty_image"),
        ({"image": "data:image/png;base64,aGVsbG8="}, "image", "invalid_image"),
        ({"image": url(drawn())[:-60]}, "image", "invalid_image"),
        ({"image": url(drawn(400, 300))}, "image", "image_too_large"),
        ({"image": "http://example.com/a.png"}, "image", "invalid_image_url"),
        ({"confidence": 1.5}, "confidence", "invalid_value"),
        ({"confidence": "0.5"}, "confidence", "invalid_value"),
        ({"iou": True}, "iou", "invalid_value"),
        ({"max_detections": 0}, "max_detections", "invalid_value"),
        ({"max_detections": 1.5}, "max_detections", "invalid_value"),
        ({"classes": []}, "classes", "invalid_value"),
        ({"classes": [None]}, "classes", "invalid_value"),
        ({"classes": {"bus": 1}}, "classes", "invalid_value"),
        ({"classes": ["pearson"]}, "classes", "unknown_class"),
        ({"classes": [1]}, "classes", "unknown_class"),
        ({"classes": ["9" * 5000]}, "classes", "unknown_class"),
        ({"model": 5}, "model", "invalid_value"),
    ],
)
def test_what_is_refused(served: Served, body: dict[str, Any], param: str, code: str) -> None:
    given = body if "image" in body or not body else {"image": url(drawn()), **body}
    assert served.refusal(given) == (400, param, code)


def test_what_a_chat_refuses(served: Served) -> None:
    path = "/v1/chat/completions"
    text = {"role": "user", "content": "hello"}
    two = chat()
    two["messages"][1]["content"] *= 2
    assert served.refusal({"messages": [text]}, path) == (400, "messages", "image_required")
    assert served.refusal(two, path) == (400, "messages", "too_many_images")
    assert served.refusal({}, path) == (400, "messages", "missing_field")
    assert served.refusal({"messages": "hello"}, path) == (400, "messages", "invalid_value")
    assert served.refusal({"messages": [1]}, path) == (400, "messages", "invalid_value")
    assert served.refusal({"messages": [{"role": "system"}]}, path) == (400, "messages", "invalid_value")
    assert served.refusal(chat(n=2), path) == (400, "n", "invalid_value")
    assert served.refusal(chat(stream="yes"), path) == (400, "stream", "invalid_value")
    assert served.refusal(chat(stream_options=1), path) == (400, "stream_options", "invalid_value")
    where = "messages.1.content.1.image_url.url"
    assert served.refusal(chat("https://example.com/a.png"), path) == (400, where, "invalid_image_url")
    assert served.refusal(chat("data:,x"), path) == (400, where, "invalid_image")


def test_what_a_form_refuses(served: Served) -> None:
    def form(fields: dict[str, str], **files: bytes) -> tuple[int, str, str]:
        parts = {name: (name, data) for name, data in files.items()} or {"x": ("x", b"x")}
        return served.refusal(None, data=fields, files=parts)

    yolo = {"model": "yolo"}
    assert form({}, image=drawn()) == (400, "model", "missing_field")
    assert form({"model": "yolov9"}, image=drawn()) == (404, "model", "model_not_found")
    assert form(yolo) == (400, "image", "missing_field")
    assert form(yolo, image=b"") == (400, "image", "empty_image")
    assert form({**yolo, "confidence": "high"}, image=drawn()) == (400, "confidence", "invalid_value")
    assert form({**yolo, "confidence": "nan"}, image=drawn()) == (400, "confidence", "invalid_value")
    assert form({**yolo, "max_detections": "9" * 5000}, image=drawn())[1:] == (
        "max_detections",
        "invalid_value",
    )
    assert form({**yolo, "classes": '["bus"'}, image=drawn()) == (400, "classes", "invalid_value")
    broken = {"content": b"abc", "headers": {"content-type": "multipart/form-data"}}
    assert served.refusal(None, **broken) == (400, None, "invalid_form")


def test_an_unknown_class_names_the_nearest(served: Served) -> None:
    answer = served.client.post(
        "/v1/detections", json={"model": "yolo", "image": url(drawn()), "classes": ["pearson"]}
    )
    assert "does not know the class 'pearson'. Did you mean 'person'" in answer.json()["error"]["message"]
    answer = served.client.post(
        "/v1/detections", json={"model": "yolo", "image": url(drawn()), "classes": ["xylophone"]}
    )
    assert "It knows 5: person, car, bus, stop sign, tie." in answer.json()["error"]["message"]
    assert class_ids(["Stop Sign", 0, "person"], NAMES) == (0, 11)


def test_only_equal_shapes_and_filters_share_a_batch(served: Served) -> None:
    served.detector.gate.clear()
    small, tall = url(drawn()), url(drawn(60, 90))
    asked = [{"image": tall, "confidence": 0.1}] + 3 * [
        {"image": small},
        {"image": tall},
        {"image": small, "confidence": 0.3},
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [pool.submit(lambda body=body: served.ask(**body)) for body in asked]
        runner = served.client.app.state.runner
        while runner._batchers[0].waiting + runner._batchers[0].running < len(asked):
            pass
        served.detector.gate.set()
        for body, answer in zip(asked, answers, strict=True):
            assert answer.result()["image"]["height"] == (90 if body["image"] == tall else 40)
    kinds = [(size, filters.confidence, shape[0]) for size, filters, shape in served.detector.calls]
    together: dict[tuple[float, int], int] = {}
    for size, confidence, height in kinds:
        together[confidence, height] = together.get((confidence, height), 0) + size
    assert together == {(0.1, 90): 1, (0.25, 40): 3, (0.25, 90): 3, (0.3, 40): 3}
    assert len(kinds) < len(asked)


def test_boxes_are_in_the_picture_as_shown(served: Served) -> None:
    image = Image.open(io.BytesIO(drawn()))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: 40 wide, 60 high
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    answer = served.ask(image=url(buffer.getvalue()))
    assert answer["image"] == {"width": 40, "height": 60}
    # (x, y) goes to (40 - y, x).
    assert answer["data"][0]["box"] == {"x1": 20.0, "y1": 10.0, "x2": 35.0, "y2": 30.0}


def test_a_large_picture_is_shrunk_and_its_boxes_are_not(served: Served) -> None:
    answer = served.ask(image=url(drawn(300, 200, (30, 60, 90, 150))))
    assert served.detector.calls[0][2] == (67, 100, 3)
    assert answer["image"] == {"width": 300, "height": 200}
    assert answer["data"][0]["box"] == {"x1": 30.0, "y1": 60.0, "x2": 90.0, "y2": 150.0}


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (99, 201)])
def test_any_proportion_is_decoded(size: tuple[int, int]) -> None:
    picture = decode_picture(drawn(*size, red=(0, 0, 1, 1)), max_pixels=10**6, keep=100, param="image")
    assert (picture.width, picture.height) == size
    assert 1 <= max(picture.pixels.shape) < 200 and picture.pixels.flags.c_contiguous


def test_weights_are_one_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold one \.pt file with YOLO weights; it has none"):
        find_weights(tmp_path)
    first = tmp_path / "a.pt"
    first.touch()
    assert find_weights(tmp_path) == first == find_weights(first)
    (tmp_path / "b.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"it has a\.pt, b\.pt"):
        find_weights(tmp_path)
