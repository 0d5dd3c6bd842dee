"""What a drawn scene holds: a background and one to five shapes that do not overlap."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from models.tiny.vision.palette import COLOURS, RGB, sample_background, sample_colour

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
MAX_COUNT = 5

# The largest radius, as a part of the shorter side, that still leaves room for so many shapes.
_MAX_RADIUS = {1: 0.42, 2: 0.28, 3: 0.22, 4: 0.19, 5: 0.17}
_CANVASES = (128, 160, 192, 224, 256, 256, 320)


@dataclass(frozen=True)
class Item:
    """One shape; lengths in pixels of the canvas, the angle in degrees."""

    shape: str
    colour: str
    rgb: RGB
    x: float
    y: float
    radius: float
    angle: float
    # Shape-dependent proportion in 0..1: how pointed a star is, how long a square is, how a triangle stands.
    form: float


@dataclass(frozen=True)
class Group:
    """All shapes of one kind and one colour."""

    shape: str
    colour: str
    count: int

    @property
    def noun(self) -> str:
        """ "red circle" or "red circles"."""
        return f"{self.colour} {self.shape}{'s' if self.count > 1 else ''}"

    @property
    def phrase(self) -> str:
        """ "a red circle" or "3 red circles"; an orange one gets its "an"."""
        if self.count > 1:
            return f"{self.count} {self.noun}"
        return f"{article(self.colour)} {self.noun}"


@dataclass(frozen=True)
class Scene:
    """A canvas of width × height pixels, its background and its shapes."""

    width: int
    height: int
    background: str
    background_rgb: RGB
    items: tuple[Item, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The scene's groups in the order of SHAPES, then of COLOURS: the order in which answers name
        them."""
        counts = Counter((item.shape, item.colour) for item in self.items)
        order = sorted(counts, key=lambda pair: (SHAPES.index(pair[0]), COLOURS.index(pair[1])))
        return tuple(Group(shape, colour, counts[shape, colour]) for shape, colour in order)

    @property
    def main_group(self) -> Group:
        """The largest group; of equally large ones the first."""
        return max(self.groups, key=lambda group: group.count)

    def count(self, shape: str | None = None, colour: str | None = None) -> int:
        """How many shapes there are of this kind and colour; None stands for any."""
        return sum(
            (shape is None or item.shape == shape) and (colour is None or item.colour == colour)
            for item in self.items
        )


def article(word: str) -> str:
    """ "a" or "an", as the word asks for."""
    return "an" if word[0] in "aeiou" else "a"


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene; about half hold one group, the others two or three."""
    width, height = _sample_canvas(rng)
    background, behind = sample_background(rng)
    kinds = _sample_kinds(rng, background, behind)
    spots = _place(rng, len(kinds), width, height)
    items = tuple(
        Item(shape, colour, rgb, x, y, radius, _sample_angle(rng, shape), float(rng.random()))
        for (shape, colour, rgb), (x, y, radius) in zip(kinds, spots, strict=True)
    )
    return Scene(width, height, background, behind, items)


def _sample_canvas(rng: np.random.Generator) -> tuple[int, int]:
    side = _CANVASES[rng.integers(len(_CANVASES))]
    if rng.random() < 0.8:
        return side, side
    longer = int(side * rng.uniform(1.1, 1.6))
    return (longer, side) if rng.random() < 0.6 else (side, longer)


def _sample_kinds(rng: np.random.Generator, background: str, behind: RGB) -> list[tuple[str, str, RGB]]:
    total = int(rng.integers(1, MAX_COUNT + 1))
    wanted = min(total, int(rng.choice([1, 2, 3], p=[0.5, 0.36, 0.14])))
    groups: dict[tuple[str, str], RGB] = {}
    while len(groups) < wanted:
        colour, rgb = sample_colour(rng, background, behind)
        groups.setdefault((SHAPES[rng.integers(len(SHAPES))], colour), rgb)
    kinds = [(shape, colour, rgb) for (shape, colour), rgb in groups.items()]
    kinds += [kinds[rng.integers(wanted)] for _ in range(total - wanted)]
    return [kinds[index] for index in rng.permutation(total)]


def _place(rng: np.random.Generator, count: int, width: int, height: int) -> list[tuple[float, float, float]]:
    """Centres and radii (pixels) of circles that neither overlap nor leave the canvas."""
    side = min(width, height)
    smallest = 0.085 if width == height else 0.1
    common = rng.uniform(smallest, _MAX_RADIUS[count]) * side
    varied = rng.random() < 0.5
    if count > 1 and rng.random() < 0.2:
        return _place_in_row(rng, count, width, height)
    for attempt in range(60):
        # Each failed attempt makes the shapes a little smaller, so that this ends.
        shrink = 0.97**attempt
        spots: list[tuple[float, float, float]] = []
        for _ in range(count):
            radius = rng.uniform(smallest, _MAX_RADIUS[count]) * side if varied else common
            radius = max(radius * shrink, 0.07 * side)
            for _ in range(20):
                x = rng.uniform(radius + 1, width - radius - 1)
                y = rng.uniform(radius + 1, height - radius - 1)
                if all(np.hypot(x - u, y - v) > 1.12 * (radius + r) for u, v, r in spots):
                    spots.append((float(x), float(y), float(radius)))
                    break
            else:
                break
        if len(spots) == count:
            return spots
    return _place_in_row(rng, count, width, height)


def _place_in_row(
    rng: np.random.Generator, count: int, width: int, height: int
) -> list[tuple[float, float, float]]:
    """Equal shapes side by side or one above the other, as people often draw them."""
    across = rng.random() < 0.7
    length, breadth = (width, height) if across else (height, width)
    step = length / count
    radius = float(min(rng.uniform(0.3, 0.44) * step, 0.42 * breadth))
    middle = float(rng.uniform(radius + 1, breadth - radius - 1)) if rng.random() < 0.5 else breadth / 2
    spots = [(step * (index + 0.5), middle, radius) for index in range(count)]
    return spots if across else [(y, x, r) for x, y, r in spots]


def _sample_angle(rng: np.random.Generator, shape: str) -> float:
    if shape == "circle" or rng.random() < 0.65:
        return 0.0
    # A square turned by 45 degrees is a diamond to many people, so it stays well short of that.
    return float(rng.uniform(-20, 20) if shape == "square" else rng.uniform(0, 360))
