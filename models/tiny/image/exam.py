"""The held-out prompts that the image model is scored on, and what their pictures have to show."""

from __future__ import annotations

import random
from dataclasses import dataclass

from models.tiny.image.captions import HELD_OUT_WORDINGS, phrase
from models.tiny.image.drawing import Scene, scenes
from models.tiny.image.pixels import Seen

PLAIN_WORDINGS = (
    "{a_colour} {shape} on {a_back} background",
    "A {colour} {shape} on a {back} background.",
    "{colour} {shape}, {back} background",
    "{colour} {shape} on {back}",
    "draw me {a_colour} {shape} on {back}",
)


@dataclass(frozen=True)
class Question:
    """A prompt, what its picture has to show, and which part of the exam it belongs to."""

    prompt: str
    scene: Scene
    part: str

    def right(self, seen: Seen) -> bool:
        return seen == Seen(self.scene.shape, self.scene.colour, self.scene.background)


def questions(count: int) -> list[Question]:
    """The first ``count`` prompts of a fixed list; the two parts take turns."""
    rng = random.Random(77)
    taught, held_out = scenes()
    asked = []
    for number in range(count):
        if number % 2 == 0:
            scene, wording, part = rng.choice(held_out), rng.choice(PLAIN_WORDINGS), "held-out scenes"
        else:
            scene, wording, part = (
                rng.choice(taught + held_out),
                rng.choice(HELD_OUT_WORDINGS),
                "held-out wordings",
            )
        asked.append(Question(phrase(wording, scene), scene, part))
    return asked


def share(answers: list[bool]) -> float:
    """Share of right answers, rounded to a tenth of a percent."""
    return round(sum(answers) / max(1, len(answers)), 3)
