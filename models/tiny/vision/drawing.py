"""Draws a scene, and says what lies under each patch of the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from models.tiny.vision.palette import COLOURS, RGB
from models.tiny.vision.scenes import SHAPES, Item, Scene

IMAGE_SIZE = 96
PATCH_SIZE = 12
GRID = IMAGE_SIZE // PATCH_SIZE

Point = tuple[float, float]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PatchLabels:
    """What each of the GRID × GRID patches shows, row by row; each array has shape (GRID * GRID,).

    `shape` and `colour` are 0 for "nothing", else 1 + the index in SHAPES or COLOURS, and -100 (ignored)
    where a shape only grazes the patch. `centre` is 1 where a shape has its centre. `same_kind`,
    `same_shape` and `same_colour` say how many shapes of the picture are like the patch's own, -100 where
    it shows none. `background` (an index) and `total` (shapes in the picture) are one number for all.
    """

    shape: IntArray
    colour: IntArray
    centre: IntArray
    same_kind: IntArray
    same_shape: IntArray
    same_colour: IntArray
    background: int
    total: int


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of its own size; rng picks how it is drawn (smoothing, outline, noise)."""
    # Supersampling gives the smooth edges of a vector program, its absence the jagged ones of ImageDraw.
    scale = 2 if rng.random() < 0.4 else 1
    picture = Image.new("RGB", (scene.width * scale, scene.height * scale), scene.background_rgb)
    pen = ImageDraw.Draw(picture)
    outline = (0, 0, 0) if rng.random() < 0.06 and "black" not in _colours_in(scene) else None
    for item in scene.items:
        _draw_item(pen, item, scale, scale, item.rgb, outline)
    if scale > 1:
        picture = picture.resize((scene.width, scene.height), Image.Resampling.BOX)
    if rng.random() < 0.08:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.5))))
    return picture


def to_pixels(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """The picture as the model's processor scales it: (IMAGE_SIZE, IMAGE_SIZE, 3), 0..255."""
    small = picture.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(small, dtype=np.uint8)


def label_patches(scene: Scene) -> PatchLabels:
    """What is to be seen in each patch, for the auxiliary loss of the training."""
    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    pen = ImageDraw.Draw(mask)
    across, down = IMAGE_SIZE / scene.width, IMAGE_SIZE / scene.height
    shape = np.zeros(GRID * GRID, dtype=np.int64)
    colour = np.zeros(GRID * GRID, dtype=np.int64)
    centre = np.zeros(GRID * GRID, dtype=np.int64)
    alike = np.full((3, GRID * GRID), -100, dtype=np.int64)
    for number, item in enumerate(scene.items, start=1):
        _draw_item(pen, item, across, down, number, None)
    cells = np.asarray(mask).reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE)
    best = np.zeros(GRID * GRID)
    for number, item in enumerate(scene.items, start=1):
        cover = (cells == number).mean(axis=(1, 3)).reshape(-1)
        wins = cover > best
        best = np.where(wins, cover, best)
        shape[wins] = 1 + SHAPES.index(item.shape)
        colour[wins] = 1 + COLOURS.index(item.colour)
        alike[0, wins] = scene.count(item.shape, item.colour)
        alike[1, wins] = scene.count(item.shape)
        alike[2, wins] = scene.count(None, item.colour)
        column = min(int(item.x * across) // PATCH_SIZE, GRID - 1)
        row = min(int(item.y * down) // PATCH_SIZE, GRID - 1)
        centre[row * GRID + column] = 1
    grazed = (best > 0) & (best < 0.08)
    shape[grazed] = -100
    colour[grazed] = -100
    alike[:, grazed] = -100
    ground = COLOURS.index(scene.background)
    return PatchLabels(shape, colour, centre, alike[0], alike[1], alike[2], ground, len(scene.items))


def _colours_in(scene: Scene) -> set[str]:
    return {scene.background, *(item.colour for item in scene.items)}


def _draw_item(
    pen: ImageDraw.ImageDraw, item: Item, across: float, down: float, fill: RGB | int, outline: RGB | None
) -> None:
    if item.shape == "circle":
        box = [
            (item.x - item.radius) * across,
            (item.y - item.radius) * down,
            (item.x + item.radius) * across,
            (item.y + item.radius) * down,
        ]
        pen.ellipse(box, fill=fill, outline=outline)
        return
    pen.polygon([(x * across, y * down) for x, y in _corners(item)], fill=fill, outline=outline)


def _corners(item: Item) -> list[Point]:
    """The polygon's corners in pixels of the canvas, all within the item's radius of its centre (or
    nearly)."""
    turn = math.radians(item.angle)
    if item.shape == "star":
        inner = 0.36 + 0.14 * item.form
        around = [(1.0 if k % 2 == 0 else inner, math.pi * k / 5) for k in range(10)]
        unit = [(r * math.sin(a), -r * math.cos(a)) for r, a in around]
    elif item.shape == "square":
        half = 0.72 + 0.2 * item.form
        unit = [(-half, -half), (half, -half), (half, half), (-half, half)]
    elif item.form < 0.5:
        unit = [(math.sin(a), -math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    else:
        # The triangle that fills a box, as one draws it from the corners of a rectangle.
        foot = 0.65 + 0.55 * (item.form - 0.5)
        unit = [(0.0, -0.95), (foot, 0.8), (-foot, 0.8)]
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        (item.x + item.radius * (x * cos - y * sin), item.y + item.radius * (x * sin + y * cos))
        for x, y in unit
    ]
