"""The tiny vision model: its scenes are sound, its answers right, its folder loads and sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.tiny.vision.drawing import GRID, draw, label_patches, to_pixels
from models.tiny.vision.questions import KINDS, sample_question
from models.tiny.vision.records import sample_record
from models.tiny.vision.scenes import MAX_COUNT, SHAPES, Scene, sample_scene

WEIGHTS = Path("models/tiny/vision/weights")


def scenes(count: int) -> list[Scene]:
    return [sample_scene(np.random.default_rng([5, number])) for number in range(count)]


def test_shapes_stay_apart_and_inside() -> None:
    for scene in scenes(200):
        assert 1 <= len(scene.items) <= MAX_COUNT
        for index, item in enumerate(scene.items):
            assert 0 < item.x < scene.width and 0 < item.y < scene.height
            for other in scene.items[index + 1 :]:
                assert np.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


def test_same_seed_same_picture() -> None:
    one, other = (to_pixels(draw(scenes(1)[0], np.random.default_rng(1))) for _ in range(2))
    assert (one == other).all()


def test_every_shape_has_a_centre_patch() -> None:
    for scene in scenes(100):
        labels = label_patches(scene)
        assert labels.shape.shape == (GRID * GRID,)
        assert 1 <= labels.centre.sum() <= len(scene.items)
        assert set(labels.shape.tolist()) <= {-100, *range(len(SHAPES) + 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_questions_leave_no_slot_open(kind: str, held_out: bool) -> None:
    rng = np.random.default_rng(2)
    for scene in scenes(50):
        question = sample_question(rng, scene, kind, held_out)
        assert not set("{}[]|") & set(question.text + question.answer), question


def test_records_are_json() -> None:
    rng = np.random.default_rng(3)
    for scene in scenes(200):
        assert isinstance(json.loads(sample_record(rng, scene).answer), dict)


@pytest.mark.engines
def test_committed_weights_answer_held_out_scenes() -> None:
    from models.tiny.vision.evaluate import answer_here, score
    from models.tiny.vision.exam import sample_tasks

    scores = score(sample_tasks(40, ("what", "background", "plain")), answer_here(WEIGHTS))
    assert scores["all"] >= 0.85, scores
