"""Image generation: the picture shows what was asked; seed, sizes, n, steps, formats."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

MODEL = "tiny-image"


def generate(client: openai.OpenAI, prompt: str, **options: Any) -> list[Image.Image]:
    extra = {name: options.pop(name) for name in ("seed", "steps") if name in options}
    answer = client.images.generate(model=MODEL, prompt=prompt, extra_body=extra, **options)
    assert answer.data
    return [Image.open(io.BytesIO(base64.b64decode(row.b64_json or ""))) for row in answer.data]


def test_a_red_circle_on_a_blue_background(client: openai.OpenAI) -> None:
    picture = generate(client, "a red circle on a blue background", size="256x256", seed=3)[0]
    assert picture.size == (256, 256)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle, corner = pixels[118:138, 118:138].mean((0, 1)), pixels[:16, :16].mean((0, 1))
    assert middle[0] > 150 and middle[2] < 110, middle
    assert corner[2] > 150 and corner[0] < 110, corner


def test_the_seed_gives_the_same_picture(client: openai.OpenAI) -> None:
    one, two, other = (
        np.asarray(generate(client, "a green square on a white background", seed=seed)[0])
        for seed in (5, 5, 6)
    )
    assert (one == two).all()
    assert (one != other).any()


def test_n_size_and_steps(client: openai.OpenAI) -> None:
    pictures = generate(
        client, "a blue triangle on a yellow background", n=2, size="512x512", seed=1, steps=4
    )
    assert [picture.size for picture in pictures] == [(512, 512)] * 2
    assert (np.asarray(pictures[0]) != np.asarray(pictures[1])).any()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_output_formats(client: openai.OpenAI, kind: Any) -> None:
    assert generate(client, "a red circle", output_format=kind)[0].format == kind.upper()


@pytest.mark.parametrize(
    ("options", "param"),
    [({"n": 11}, "n"), ({"size": "7x9999999"}, "size"), ({"size": "big"}, "size"), ({"n": 0}, "n")],
)
def test_values_that_cannot_be_are_refused(client: openai.OpenAI, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        generate(client, "a red circle", **options)
    assert caught.value.param == param
