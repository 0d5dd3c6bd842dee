"""The tiny image model: captions, training pictures, the judge of pixels, the committed pipeline."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from models.tiny.image.captions import HELD_OUT_WORDINGS, every_training_word, phrase, random_caption
from models.tiny.image.drawing import COLOURS, SHAPES, Scene, draw, scenes
from models.tiny.image.exam import questions, share
from models.tiny.image.pixels import Pixels, Seen, look

WEIGHTS = Path("models/tiny/image/weights")
#: Not the colours that training pictures have: the judge must know colours, not numbers.
PAINTS = {
    "red": "crimson",
    "green": "limegreen",
    "blue": "royalblue",
    "yellow": "gold",
    "orange": "darkorange",
    "purple": "darkorchid",
    "white": "whitesmoke",
    "black": "#1a1a1a",
}


STRANGERS = (
    "upside-down",
    "ring",
    "cross",
    "bar",
    "trapezoid",
    "leaning",
    "diamond",
    "pac-man",
    "house",
)


def sketch(shape: str, colour: str, background: str, side: int = 96) -> Pixels:
    """A shape drawn by Pillow, four times as large and scaled down, so that its edges are soft."""
    big = side * 4
    image = Image.new("RGB", (big, big), background)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = big * 0.2, big * 0.22, big * 0.76, big * 0.78
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=colour)
    elif shape == "upside-down":
        pen.polygon([((left + right) / 2, bottom), (left, top), (right, top)], fill=colour)
    elif shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=colour, width=big // 14)
    elif shape == "cross":
        pen.rectangle((big * 0.4, top, big * 0.56, bottom), fill=colour)
        pen.rectangle((left, big * 0.42, right, big * 0.58), fill=colour)
    elif shape == "trapezoid":
        pen.polygon([(big * 0.34, top), (big * 0.62, top), (right, bottom), (left, bottom)], fill=colour)
    elif shape == "leaning":
        pen.polygon([(left, top), (left, bottom), (right, bottom)], fill=colour)
    elif shape == "diamond":
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        pen.polygon([(middle_x, top), (right, middle_y), (middle_x, bottom), (left, middle_y)], fill=colour)
    elif shape == "pac-man":
        pen.pieslice((left, top, right, bottom), 45, 315, fill=colour)
    elif shape == "house":
        pen.polygon([((left + right) / 2, top), (left, big * 0.5), (right, big * 0.5)], fill=colour)
        pen.rectangle((left, big * 0.5, right, bottom), fill=colour)
    elif shape == "bar":
        pen.rectangle((left, big * 0.42, right, big * 0.58), fill=colour)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [64, 96])
def test_the_judge_names_what_it_sees(shape: str, side: int) -> None:
    for colour in PAINTS:
        for background in PAINTS:
            if colour != background:
                picture = sketch(shape, PAINTS[colour], PAINTS[background], side)
                assert look(picture) == Seen(shape, colour, background)


@pytest.mark.parametrize("shape", STRANGERS)
def test_the_judge_does_not_take_one_thing_for_another(shape: str) -> None:
    assert look(sketch(shape, "crimson", "royalblue")).shape is None


def test_the_judge_refuses_what_is_no_picture_of_a_shape() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert look(noise).shape is None and look(noise).background is None
    assert look(sketch("nothing", "red", "royalblue")) == Seen(None, None, "blue")
    assert look(np.full((64, 64, 3), 128, dtype=np.uint8)) == Seen(None, None, None)


def test_the_judge_refuses_a_shape_of_two_colours() -> None:
    picture = sketch("square", "crimson", "royalblue").copy()
    picture[:48][(picture[:48] == picture[47, 48]).all(axis=2)] = (30, 160, 50)
    assert look(picture).colour is None


def test_the_judge_reads_training_pictures_too() -> None:
    import torch

    every = [scene for part in scenes() for scene in part]
    pictures = draw(every, 64, 64, torch.Generator().manual_seed(1)).permute(0, 2, 3, 1).numpy()
    for scene, picture in zip(every, (pictures * 255).round().astype(np.uint8), strict=True):
        assert look(picture) == Seen(scene.shape, scene.colour, scene.background)


def test_held_out_scenes_are_apart_and_every_word_is_taught() -> None:
    taught, held_out = scenes()
    assert len(taught) == 143 and len(held_out) == 25
    assert not set(taught) & set(held_out)
    assert {s.shape for s in taught} == set(SHAPES)
    assert {s.colour for s in taught} == {s.background for s in taught} == set(COLOURS)


def test_held_out_wordings_are_no_training_captions() -> None:
    rng = random.Random(5)
    scene = Scene("circle", "red", "blue")
    trained = {random_caption(scene, rng) for _ in range(20_000)}
    assert len(trained) > 2000
    assert not trained & {phrase(wording, scene).lower() for wording in HELD_OUT_WORDINGS}
    known = " ".join(every_training_word())
    assert not {"over", "drawn", "placed", "backdrop", "can"} & set(known.split())


def test_a_caption_always_says_shape_and_colour() -> None:
    rng = random.Random(6)
    for scene in scenes()[0]:
        words = random_caption(scene, rng).replace(",", " ").replace(".", " ").replace("!", " ").split()
        assert scene.colour in words
        assert {scene.shape, "disc", "ball", "dot", "box"} & set(words)


def test_the_exam_is_fixed_and_has_both_parts() -> None:
    asked = questions(200)
    assert asked == questions(200)
    assert sum(q.part == "held-out scenes" for q in asked) == 100
    held_out = set(scenes()[1])
    assert all(q.scene in held_out for q in asked if q.part == "held-out scenes")
    right = Seen(asked[0].scene.shape, asked[0].scene.colour, asked[0].scene.background)
    assert asked[0].right(right) and not asked[0].right(Seen(None, right.colour, right.background))


def test_share() -> None:
    assert share([True, True, False]) == 0.667
    assert share([]) == 0.0


def test_the_committed_pipeline_is_whole_and_small() -> None:
    assert (WEIGHTS / "model_index.json").exists()
    weights = sorted(path.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.rglob("*.safetensors"))
    assert weights == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 15_000_000
