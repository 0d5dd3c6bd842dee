"""The colours that the model knows by name, each with the RGB values people usually mean by it."""

from __future__ import annotations

import numpy as np

RGB = tuple[int, int, int]

# Several anchors a name: the CSS value that drawing libraries use, and the softer ones people pick by hand.
ANCHORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 30, 40), (200, 0, 0), (230, 60, 50), (255, 40, 40)),
    "orange": ((255, 165, 0), (255, 140, 0), (240, 120, 20)),
    "yellow": ((255, 255, 0), (250, 220, 40), (255, 235, 90), (240, 230, 30)),
    "green": ((0, 128, 0), (0, 255, 0), (40, 180, 70), (0, 160, 0), (30, 140, 60), (20, 200, 30)),
    "blue": ((0, 0, 255), (30, 60, 220), (30, 144, 255), (65, 105, 225), (0, 0, 180), (40, 80, 200)),
    "purple": ((128, 0, 128), (148, 0, 211), (120, 50, 170), (150, 60, 200)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 150, 190)),
    "black": ((0, 0, 0), (0, 0, 0), (25, 25, 25)),
    "white": ((255, 255, 255), (255, 255, 255), (240, 240, 240)),
    "gray": ((128, 128, 128), (160, 160, 160), (100, 100, 100), (190, 190, 190)),
}
COLOURS: tuple[str, ...] = tuple(ANCHORS)

# Pale skies are common behind a drawing and still called blue.
BACKGROUND_ANCHORS: dict[str, tuple[RGB, ...]] = {
    **ANCHORS,
    "blue": (*ANCHORS["blue"], (173, 216, 230), (135, 206, 235)),
}
_BACKGROUND_WEIGHTS = {"white": 6.0, "black": 3.0, "gray": 2.5}

# Two colours nearer than this (Euclidean, RGB) are hard to tell apart even for a person.
MIN_CONTRAST = 60.0
_JITTER = 12


def sample_rgb(rng: np.random.Generator, anchors: tuple[RGB, ...]) -> RGB:
    """One RGB value (0..255) near a random anchor; half of the time the anchor itself."""
    anchor = np.array(anchors[rng.integers(len(anchors))])
    if rng.random() < 0.5:
        anchor = anchor + rng.integers(-_JITTER, _JITTER + 1, 3)
    r, g, b = np.clip(anchor, 0, 255).tolist()
    return int(r), int(g), int(b)


def sample_background(rng: np.random.Generator) -> tuple[str, RGB]:
    """A background colour: its name and its RGB value."""
    weights = np.array([_BACKGROUND_WEIGHTS.get(name, 1.0) for name in COLOURS])
    name = COLOURS[rng.choice(len(COLOURS), p=weights / weights.sum())]
    return name, sample_rgb(rng, BACKGROUND_ANCHORS[name])


def sample_colour(rng: np.random.Generator, background: str, behind: RGB) -> tuple[str, RGB]:
    """A colour for a shape that stands out from what is behind it: its name and its RGB value."""
    while True:
        name = COLOURS[rng.integers(len(COLOURS))]
        if name == background:
            continue
        rgb = sample_rgb(rng, ANCHORS[name])
        if contrast(rgb, behind) >= MIN_CONTRAST:
            return name, rgb


def contrast(one: RGB, other: RGB) -> float:
    """Euclidean distance of two RGB values, 0 to about 442."""
    return float(np.linalg.norm(np.subtract(one, other)))
