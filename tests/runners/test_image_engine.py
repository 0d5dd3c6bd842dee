"""The image runner with the committed weights, as a process on a socket: its pictures show what was asked."""

from __future__ import annotations

import asyncio
import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.tiny.image.exam import questions
from models.tiny.image.pixels import Pixels, Seen, look
from tests.runners.conftest import Started, StartRunner

WEIGHTS = Path(__file__).resolve().parents[2] / "models/tiny/image/weights"
PATH = "/v1/images/generations"


def start(start_runner: StartRunner) -> Started:
    return start_runner(
        "engine.runners.image",
        model="tiny-image",
        category="image",
        engine="diffusers",
        model_dir=WEIGHTS,
        max_batch=8,
        max_wait_ms=50,
        can_sleep=True,
        options={"steps": 12, "guidance_scale": 4.0},
    )


def pixels(answer: dict[str, Any], index: int = 0) -> Pixels:
    data = base64.b64decode(answer["data"][index]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.engines
async def test_pictures_show_what_was_asked_for(start_runner: StartRunner) -> None:
    runner = start(start_runner)
    await runner.ready(120)

    async def ask(prompt: str, **more: Any) -> dict[str, Any]:
        body = {"model": "tiny-image", "prompt": prompt, "seed": 1, "size": "64x64", **more}
        status, answer, _ = await runner.post(PATH, body)
        assert status == 200, answer
        return dict(answer)

    # Twenty held-out prompts at once: they are painted together, a batch after another.
    asked = questions(20)
    answers = await asyncio.gather(*(ask(question.prompt) for question in asked))
    right = [question.right(look(pixels(answer))) for question, answer in zip(asked, answers, strict=True)]
    assert sum(right) >= 17, [q.prompt for q, ok in zip(asked, right, strict=True) if not ok]

    # The same seed gives the same picture, alone or in company (but for the rounding of float sums).
    alone = await ask(asked[3].prompt)
    again = await ask(asked[3].prompt)
    assert (pixels(alone) == pixels(again)).all()
    assert np.abs(pixels(alone).astype(int) - pixels(answers[3])).max() <= 2
    other = await ask(asked[3].prompt, seed=2)
    assert (pixels(other) != pixels(alone)).any()

    # Words that it was never taught and sizes that it does not paint.
    wide = await ask("Kindly render a red circle on a blue background, trending artwork!", size="768x512")
    assert pixels(wide).shape == (512, 768, 3)
    assert look(pixels(wide)[:, 128:640:1]) == Seen("circle", "red", "blue")
    pair = await ask("blue square", n=2)
    assert [look(pixels(pair, i)).colour for i in range(2)] == ["blue", "blue"]
    for _ in range(2):
        await runner.sleeps_and_wakes(WEIGHTS)
        assert (pixels(await ask(asked[3].prompt)) == pixels(alone)).all()
    status, error, _ = await runner.post(PATH, {"model": "tiny-image", "prompt": "x", "size": "7x7"})
    assert (status, error["error"]["param"]) == (400, "size")


@pytest.fixture
def flux_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "flux"
    subprocess.run([sys.executable, "-m", "tests.runners.tiny_flux", str(folder)], check=True, timeout=200)
    return folder


@pytest.mark.engines
async def test_another_kind_of_pipeline_is_served_from_its_folder(
    start_runner: StartRunner, flux_folder: Path
) -> None:
    runner = start_runner(
        "engine.runners.image",
        model="flux",
        category="image",
        engine="diffusers",
        model_dir=flux_folder,
        options={"default_size": "128x64", "steps": 2},
    )
    await runner.ready(120)
    body = {"model": "flux", "prompt": "a red circle", "n": 2, "seed": 1, "guidance_scale": 2}
    status, answer, _ = await runner.post(PATH, body)
    assert status == 200, answer
    assert answer["size"] == "128x64" and "painted_size" not in answer
    one, other = pixels(answer, 0), pixels(answer, 1)
    assert one.shape == (64, 128, 3)
    assert (one != other).any()
    status, again, _ = await runner.post(PATH, body)
    assert (pixels(again, 1) == other).all()
    status, error, _ = await runner.post(PATH, body | {"size": "122x64"})
    assert (status, error["error"]["code"]) == (400, "invalid_size")
