"""Warm-up requests: real ones of their category, and judged."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import wave
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from python_multipart import parse_form

from engine.runners.spec import Category, RunnerSpec
from engine.scheduler.warmup import warm_up_asks

CATEGORIES = get_args(Category)
GOOD: dict[str, Any] = {
    "chat": {"choices": [{"message": {"content": "Hi"}}]},
    "vision": {"choices": [{"message": {"content": None, "reasoning_content": "Hm"}}]},
    "code": {"choices": [{"text": " a + b"}]},
    "image": {"data": [{"b64_json": base64.b64encode(b"\x89PNG\r\n").decode()}]},
    "audio": {"text": ""},
    "embedding": {"data": [{"embedding": [1.0]}, {"embedding": [0.5]}]},
    "detection": {"data": []},
}
BAD: list[tuple[str, Any]] = [
    ("chat", {"choices": [{"message": {"content": ""}}]}),
    ("chat", {"choices": []}),
    ("chat", []),
    ("code", {"choices": [{"text": ""}]}),
    ("image", {"data": [{"b64_json": "AAAA"}]}),
    ("image", {"data": [{"b64_json": "?"}]}),
    ("audio", {"error": "x"}),
    ("embedding", {"data": [{"embedding": [1.0]}]}),
    ("embedding", {"data": [{"embedding": [math.nan]}, {"embedding": [1.0]}]}),
    ("embedding", {"data": [{"embedding": [0.0]}, {"embedding": [1.0]}]}),
    ("detection", {"data": None}),
]


def spec(category: str, engine: str = "vllm") -> RunnerSpec:
    fields = {
        "model": "m",
        "category": category,
        "engine": engine,
        "model_dir": Path("/"),
        "socket": Path("/s"),
    }
    return RunnerSpec.model_validate(fields)


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_category_asks_for_its_model_and_takes_a_right_answer(category: str) -> None:
    asks = warm_up_asks(spec(category))
    assert asks
    for ask in asks:
        assert b'"m"' in ask.body or b"\r\nm\r\n" in ask.body
        assert ask.fault(200, json.dumps(GOOD[category]).encode()) == ""
        assert ask.fault(500, b"{}") == "status 500"
        assert ask.fault(200, b"<html>") == "not JSON"


@pytest.mark.parametrize(("category", "answer"), BAD)
def test_wrong_answers_are_seen(category: str, answer: Any) -> None:
    assert warm_up_asks(spec(category))[0].fault(200, json.dumps(answer).encode())


def test_vllm_also_compiles_a_grammar() -> None:
    bodies = [json.loads(ask.body) for ask in warm_up_asks(spec("chat"))]
    assert [body.get("response_format", {}).get("type") for body in bodies] == [None, "json_schema"]
    assert len(warm_up_asks(spec("chat", "diffusers"))) == 1


def test_pictures_are_pictures() -> None:
    detection = json.loads(warm_up_asks(spec("detection"))[0].body)["image"]
    content = json.loads(warm_up_asks(spec("vision"))[0].body)["messages"][0]["content"]
    for url in (detection, content[1]["image_url"]["url"]):
        head, _, data = url.partition(",")
        assert head == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.convert("RGB").getpixel((48, 48)) == (255, 0, 0)


def test_the_sound_is_a_second_of_sound_in_a_readable_form() -> None:
    (ask,) = warm_up_asks(spec("audio"))
    fields: dict[str, bytes] = {}
    headers = {"Content-Type": ask.content_type.encode(), "Content-Length": str(len(ask.body)).encode()}
    parse_form(
        headers,
        io.BytesIO(ask.body),
        lambda field: fields.update({field.field_name.decode(): field.value}),
        lambda file: fields.update({"file": file.file_object.seek(0) or file.file_object.read()}),
    )
    assert (fields["model"], fields["response_format"]) == (b"m", b"json")
    with wave.open(io.BytesIO(fields["file"])) as sound:
        assert sound.getnframes() == sound.getframerate() == 16_000
        samples = struct.unpack("<16000h", sound.readframes(16_000))
    assert max(map(abs, samples)) > 3000
