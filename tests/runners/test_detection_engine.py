"""The detection runner with the real YOLO-World, against the library's own predict."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.runners.conftest import ROOT, StartRunner

pytestmark = pytest.mark.engines
MODEL = "yolov8s-world"

#: The library alone on the files themselves, without this project's decoding, batching and rounding.
LIBRARY = """
import json, sys
from pathlib import Path
from engine.runners.detection_library import load
model = load(Path(sys.argv[1]), "cpu", settings=Path(sys.argv[2]))
for result in (model.predict(picture, verbose=False)[0] for picture in sys.argv[3:]):
    boxes = result.boxes
    rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist())
    print(json.dumps([[result.names[int(index)], confidence, box] for index, confidence, box in rows]))
"""


def library(
    weights: Path, settings: Path, pictures: list[Path]
) -> list[list[tuple[str, float, list[float]]]]:
    paths = os.pathsep.join([str(ROOT / "engine/runners/shim"), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(weights), str(settings), *map(str, pictures)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


async def test_boxes_are_the_librarys_own(
    start_runner: StartRunner, weights: Callable[[str], Path], tmp_path: Path
) -> None:
    origin = (find_spec("ultralytics") or pytest.fail("ultralytics is not installed")).origin
    assets = Path(str(origin)).parent / "assets"
    pictures = [assets / "bus.jpg", assets / "zidane.jpg"]
    contents = {picture: picture.read_bytes() for picture in pictures}
    folder = weights(MODEL)
    expected = await asyncio.to_thread(library, folder, tmp_path / "settings", pictures)
    started = start_runner(
        "engine.runners.detection",
        model=MODEL,
        category="detection",
        engine="ultralytics",
        model_dir=folder,
        max_wait_ms=200,
        can_sleep=True,
    )
    await started.ready(120)

    async def ask(picture: Path, **fields: str) -> Any:
        form = aiohttp.FormData({"model": MODEL, **fields})
        form.add_field("image", contents[picture], filename=picture.name, content_type="image/jpeg")
        status, body, _ = await started.post("/v1/detections", form)
        assert status == 200, body
        return body

    # Each picture twice and at once: company of its own shape and of another.
    answers = await asyncio.gather(*(ask(picture) for picture in (*pictures, *pictures)))
    for answer, rows in zip(answers, [*expected, *expected], strict=True):
        assert [row["label"] for row in answer["data"]] == [row[0] for row in rows]
        for row, (_, confidence, box) in zip(answer["data"], rows, strict=True):
            assert abs(row["confidence"] - confidence) < 0.02
            assert iou([row["box"][side] for side in ("x1", "y1", "x2", "y2")], box) >= 0.9
    bus, zidane = answers[:2]
    assert (bus["image"], zidane["image"]) == (
        {"width": 810, "height": 1080},
        {"width": 1280, "height": 720},
    )
    sure = [row["label"] for row in bus["data"] if row["confidence"] > 0.5]
    assert sure.count("bus") == 1 and sure.count("person") >= 3
    only = await ask(pictures[0], classes="bus", confidence="0.5", max_detections="1")
    assert [row["label"] for row in only["data"]] == ["bus"]

    alone = await ask(pictures[0])
    for _ in range(2):
        await started.sleeps_and_wakes(folder)
        assert await ask(pictures[0]) == alone

    started.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(started.process.wait, 15) == 0
