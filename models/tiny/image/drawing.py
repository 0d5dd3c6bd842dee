"""Scenes of one coloured shape on a coloured background, their pictures and their captions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 40),
    "orange": (250, 140, 20),
    "purple": (130, 40, 170),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
SHAPES = ("circle", "square", "triangle")

PHRASINGS = (
    "{c} {s} on {b} background",
    "{c} {s} on {b} background",
    "{c} {s} on {b}",
    "{cc} {s}, {bb} background",
    "{cc} {s} on {bb} background",
    "{cc} {s} on {bb}",
    "picture of {c} {s} on {b} background",
    "photo of {c} {s} in front of {b} background",
    "draw {c} {s} on {b} background",
    "{b} background with {c} {s}",
    "on {b} background, {c} {s}",
    "an image of {c} {s} with {b} background",
)
HELD_OUT_PHRASINGS = (
    "please paint one {cc} {s} over {b} background",
    "{c} {s} drawn on {b} background",
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a shape, its colour, and the colour behind it."""

    shape: str
    colour: str
    background: str

    def caption(self, phrasing: str) -> str:
        """The scene in words; `{c}`/`{b}` take an article, `{cc}`/`{bb}` do not."""

        def article(word: str) -> str:
            return f"an {word}" if word[0] in "aeiou" else f"a {word}"

        return phrasing.format(
            c=article(self.colour),
            b=article(self.background),
            cc=self.colour,
            bb=self.background,
            s=self.shape,
        )


def scenes() -> tuple[list[Scene], list[Scene]]:
    """All scenes split into (training, held out); one in six combinations is held out."""
    every = [Scene(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]
    random.Random(20).shuffle(every)
    held = len(every) // 6
    return every[held:], every[:held]


def random_caption(scene: Scene, rng: random.Random) -> str:
    """A training caption; sometimes with words the tokenizer does not know around it."""
    text = scene.caption(rng.choice(PHRASINGS))
    roll = rng.random()
    if roll < 0.1:
        text = "zzz " * rng.randint(1, 2) + text
    elif roll < 0.15:
        text = text + ", zzz zzz"
    elif roll < 0.25:
        words = text.split()
        keep = {scene.colour, scene.background, scene.shape, f"{scene.colour},"}
        text = " ".join("zzz" if w not in keep and rng.random() < 0.25 else w for w in words)
    return text


def draw(
    batch: list[Scene], height: int, width: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw each scene with a slightly random place and size.

    Returns [N, 3, height, width] in 0..1, antialiased over one pixel through the shape's signed
    distance. The shape is 50 to 66 % of the shorter side.
    """
    n, side = len(batch), min(height, width)
    uniform = torch.rand(n, 3, generator=generator)
    radius = side * (0.25 + 0.08 * uniform[:, 0])
    centre_x = width / 2 + side * 0.12 * (uniform[:, 1] - 0.5)
    centre_y = height / 2 + side * 0.12 * (uniform[:, 2] - 0.5)
    x = (torch.arange(width) + 0.5)[None, None, :] - centre_x[:, None, None]
    y = (torch.arange(height) + 0.5)[None, :, None] - centre_y[:, None, None]
    r = radius[:, None, None]
    circle = (x * x + y * y).sqrt() - r * 1.05
    square = torch.maximum(x.abs(), y.abs().expand(n, height, width)) - r * 0.95
    slope = torch.tensor(5.0).sqrt()  # the sides fall two down for one across
    triangle = torch.maximum((2 * x.abs() - y - r * 1.05) / slope, y - r * 1.05)
    kinds = torch.tensor([SHAPES.index(s.shape) for s in batch])
    distance = torch.stack([circle, square, triangle], 1)[torch.arange(n), kinds]
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    front = torch.tensor([COLOURS[s.colour] for s in batch])[:, :, None, None] / 255
    back = torch.tensor([COLOURS[s.background] for s in batch])[:, :, None, None] / 255
    return cover * front + (1 - cover) * back
