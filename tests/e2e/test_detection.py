"""Detection through the gateway, in each of its shapes.

That the boxes are the library's own is shown in tests/runners/test_detection_engine.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import KEY
from tests.e2e.pictures import data_url

MODEL = "yolov8s-world"


@pytest.fixture(scope="module")
def bus() -> Path:
    """ultralytics' own sample picture."""
    import importlib.util

    spec = importlib.util.find_spec("ultralytics")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "assets" / "bus.jpg"


@pytest.fixture(scope="module")
def http(base_url: str) -> Any:
    with httpx.Client(
        base_url=base_url, headers={"authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False
    ) as made:
        yield made


def test_bus_and_persons(http: httpx.Client, bus: Path) -> None:
    answer = http.post(
        "/detections", json={"model": MODEL, "image": data_url(bus.read_bytes(), "image/jpeg")}
    )
    found = answer.json()
    assert answer.status_code == 200, found
    assert found["object"] == "list" and found["model"] == MODEL
    assert found["image"] == {"width": 810, "height": 1080}
    labels = [row["label"] for row in found["data"] if row["confidence"] > 0.5]
    assert labels.count("bus") == 1 and labels.count("person") >= 3


def test_multipart_and_limits(http: httpx.Client, bus: Path) -> None:
    form = {"model": MODEL, "confidence": "0.5", "classes": "bus", "max_detections": "1"}
    answer = http.post("/detections", data=form, files={"image": ("bus.jpg", bus.read_bytes(), "image/jpeg")})
    assert answer.status_code == 200, answer.text
    assert [row["label"] for row in answer.json()["data"]] == ["bus"]


def test_localai_shape(http: httpx.Client, bus: Path) -> None:
    body = {"model": MODEL, "image": data_url(bus.read_bytes(), "image/jpeg"), "threshold": 0.5}
    answer = http.post("/detection", json=body)
    assert answer.status_code == 200, answer.text
    first = answer.json()["detections"][0]
    assert {"x", "y", "width", "height", "confidence", "class_name"} <= set(first)


def test_by_the_plain_sdk(client: openai.OpenAI, bus: Path) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is in this picture?"},
                    {"type": "image_url", "image_url": {"url": data_url(bus.read_bytes(), "image/jpeg")}},
                ],
            }
        ],
    )
    rows = json.loads(answer.choices[0].message.content or "")
    assert {"bus", "person"} <= {row["label"] for row in rows}


@pytest.mark.parametrize(
    ("image", "code"),
    [("data:image/png;base64,", "empty_image"), ("data:image/png;base64,AAAA", "invalid_image")],
)
def test_bad_pictures(http: httpx.Client, image: str, code: str) -> None:
    answer = http.post("/detections", json={"model": MODEL, "image": image})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["param"] == "image"
