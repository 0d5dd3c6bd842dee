"""The held-out questions: scenes, drawings and (in half of them) wordings that training never sees."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from models.tiny.vision.drawing import draw
from models.tiny.vision.palette import COLOURS
from models.tiny.vision.questions import KINDS, sample_question
from models.tiny.vision.records import flat_record
from models.tiny.vision.scenes import SHAPES, Item, Scene, sample_scene

# Training draws from seeds that begin with another number (batches.TRAINING_SEED).
HELD_OUT_SEED = 77_001
EXAM_KINDS = (*KINDS, "json", "plain")
_JSON_QUESTION = "Reply as JSON with the keys shape, color and count."
_PLAIN_SIZE = 256


@dataclass(frozen=True)
class Task:
    """A picture, a question about it and the answer that counts as right."""

    kind: str
    picture: Image.Image
    text: str
    answer: str


def sample_tasks(scenes: int, kinds: tuple[str, ...] = EXAM_KINDS) -> list[Task]:
    """One question of each kind for each of so many held-out scenes."""
    tasks: list[Task] = []
    for number in range(scenes):
        rng = np.random.default_rng([HELD_OUT_SEED, number])
        scene = sample_scene(rng)
        picture = draw(scene, rng)
        held_out = number % 2 == 1
        for kind in KINDS:
            question = sample_question(rng, scene, kind, held_out)
            tasks.append(Task(kind, picture, question.text, question.answer))
        tasks.append(Task("json", picture, _JSON_QUESTION, json.dumps(flat_record(scene))))
        tasks.append(_plain_task(rng))
    return [task for task in tasks if task.kind in kinds]


def _plain_task(rng: np.random.Generator) -> Task:
    """A drawing as a stranger makes it: Pillow's own colour names, white ground, round coordinates, 256
    pixels."""
    picture = Image.new("RGB", (_PLAIN_SIZE, _PLAIN_SIZE), "white")
    pen = ImageDraw.Draw(picture)
    shape = SHAPES[rng.integers(len(SHAPES))]
    colour = [c for c in COLOURS if c != "white"][rng.integers(len(COLOURS) - 1)]
    count = int(rng.integers(1, 5))
    cells = [(70, 70), (186, 70), (70, 186), (186, 186)] if count > 1 else [(128, 128)]
    radius = int(rng.integers(3, 6)) * (10 if count > 1 else 20)
    items: list[Item] = []
    for x, y in cells[:count]:
        _draw_plain(pen, shape, colour, x, y, radius)
        items.append(Item(shape, colour, (0, 0, 0), x, y, radius, 0.0, 0.0))
    scene = Scene(_PLAIN_SIZE, _PLAIN_SIZE, "white", (255, 255, 255), tuple(items))
    question = sample_question(rng, scene, "what")
    return Task("plain", picture, "What shape and colour is in this image?", question.answer)


def _draw_plain(pen: ImageDraw.ImageDraw, shape: str, colour: str, x: int, y: int, r: int) -> None:
    box = [x - r, y - r, x + r, y + r]
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    else:
        turns = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, r, 0.4 * r)
        pen.polygon(
            [(float(x + d * np.sin(a)), float(y - d * np.cos(a))) for d, a in zip(reach, turns, strict=True)],
            fill=colour,
        )
