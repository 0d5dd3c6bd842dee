"""The tiny vision model: its scenes are sound, its answers right, its folder loads and sees."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.tiny.vision.architecture import IMAGE_TOKENS
from models.tiny.vision.batches import draw_batch, step_rng
from models.tiny.vision.drawing import GRID, draw, label_patches, to_pixels
from models.tiny.vision.evaluate import answer_here, is_right, score
from models.tiny.vision.exam import Task, sample_tasks
from models.tiny.vision.lessons import Talk, Teacher, sample_turn
from models.tiny.vision.palette import COLOURS
from models.tiny.vision.questions import KINDS, sample_question
from models.tiny.vision.records import sample_record
from models.tiny.vision.scenes import MAX_COUNT, SHAPES, Scene, sample_scene
from models.tiny.vision.tokens import ASSISTANT, PAD
from models.tiny.vision.train import answer_rate

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


def test_patches_know_how_many_are_like_theirs() -> None:
    for scene in scenes(100):
        labels = label_patches(scene)
        assert labels.total == len(scene.items)
        covered = labels.shape > 0
        assert covered.any()
        for patch in np.flatnonzero(covered):
            shape, colour = SHAPES[labels.shape[patch] - 1], COLOURS[labels.colour[patch] - 1]
            assert labels.same_kind[patch] == scene.count(shape, colour) >= 1
            assert labels.same_shape[patch] == scene.count(shape)
            assert labels.same_colour[patch] == scene.count(None, colour)
        assert (labels.same_kind[~covered] == -100).all()


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


def test_records_without_a_picture_name_nothing() -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        record = sample_record(rng, None)
        told = json.loads(record.answer)
        for value in told.values():
            assert value in ("none", "no picture", 0, []), record


def test_what_a_hidden_schema_dictates_is_not_taught() -> None:
    teacher, rng = Teacher(), np.random.default_rng(6)
    hidden = 0
    for scene in scenes(300):
        turn = sample_turn(rng, scene)
        if turn.taught is None or (0, 0) in turn.taught or turn.taught[0][0] == 1:
            continue
        hidden += 1
        ids, taught = teacher.encode(Talk((turn,)))
        start = ids.index(ASSISTANT) + 1
        kept = teacher.tokenizer.decode([i for i, t in zip(ids[start:], taught[start:], strict=True) if t])
        answer = json.loads(turn.answer)
        rows = next(iter(answer.values())) if isinstance(next(iter(answer.values())), list) else [answer]
        for row in rows:
            for key, value in row.items():
                assert f'"{key}"' not in kept and str(value) in kept, (turn, kept)
    assert hidden > 10


def test_talks_of_a_row_do_not_see_each_other() -> None:
    teacher = Teacher()
    rows = teacher.pack(np.random.default_rng(7), scenes(4))
    start = 2 + IMAGE_TOKENS
    for tokens, positions, mask in zip(rows.tokens, rows.positions, rows.mask[:, 0], strict=True):
        assert not mask.triu(1).any()
        begins = [i for i in range(start, len(tokens)) if positions[i] in (2, start) and tokens[i] != PAD]
        assert len(begins) >= 2
        for begin, following in itertools.pairwise(begins):
            assert mask[begin:following, begin].all()
            assert not mask[following:, begin:following].any()


def test_the_same_step_draws_the_same_batch_and_another_seed_another() -> None:
    one, again, other = (draw_batch(step_rng("see", 3, seed), 2).pixels for seed in (1, 1, 2))
    assert (one == again).all() and (one != other).any()


@pytest.mark.parametrize(
    ("kind", "said", "right"),
    [
        ("what", "A red circle.", True),
        ("what", " A red circle.\n", True),
        ("what", "A red square.", False),
        ("what", "2 red circles.", False),
        ("json", '{"count": 1, "color": "red", "shape": "circle"}', True),
        ("json", '{"count": 2, "color": "red", "shape": "circle"}', False),
        ("json", "A red circle.", False),
    ],
)
def test_only_right_answers_count(kind: str, said: str, right: bool) -> None:
    answer = '{"shape": "circle", "color": "red", "count": 1}' if kind == "json" else "A red circle."
    assert is_right(Task(kind, Image.new("RGB", (8, 8)), "What is it?", answer), said) is right


def test_the_learning_rate_warms_up_stays_and_falls_to_nothing() -> None:
    rates = [answer_rate(step, 3000, peak=1.0) for step in range(3001)]
    assert rates[0] < 0.05 and rates[500] == 1.0 and rates[-1] == 0.0
    assert all(a >= b for a, b in itertools.pairwise(rates[500:]))
    # Time that runs out first takes over.
    assert answer_rate(500, 3000, time_left=0.35, peak=1.0) == pytest.approx(0.5)
    assert answer_rate(500, 3000, time_left=-0.1, peak=1.0) == 0.0


@pytest.mark.engines
def test_committed_weights_answer_held_out_scenes() -> None:
    scores = score(sample_tasks(40, ("what", "json", "plain")), answer_here(WEIGHTS))
    assert scores["all"] >= 0.9, scores
