"""Scenes of one coloured shape on a coloured background, and their pictures."""

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


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a shape, its colour, and the colour behind it."""

    shape: str
    colour: str
    background: str


def plain_background(colour: str) -> str:
    """What stands behind a shape when the prompt does not say."""
    return "black" if colour == "white" else "white"


def scenes() -> tuple[list[Scene], list[Scene]]:
    """All scenes split into (training, held out); about one in seven is held out.

    None is held out that a prompt without a background means: that meaning has to be taught.
    """
    every = [Scene(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]
    random.Random(20).shuffle(every)
    drawn = every[: len(every) // 6]
    held_out = [scene for scene in drawn if scene.background != plain_background(scene.colour)]
    return [scene for scene in every if scene not in held_out], held_out


def draw(batch: list[Scene], height: int, width: int, generator: torch.Generator) -> torch.Tensor:
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
