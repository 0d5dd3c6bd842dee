"""Says what a picture shows, from its pixels alone: the shape, its colour and the colour behind it.

Written apart from the training pictures' drawing: it knows colours by their hue as a person names them and
shapes by their outline, so it also judges shapes drawn by anything else. Where it cannot tell, it says None.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

#: Upper ends of hue ranges in degrees, and what they are called.
HUES = (
    (15, "red"),
    (41, "orange"),
    (70, "yellow"),
    (170, "green"),
    (255, "blue"),
    (320, "purple"),
    (361, "red"),
)
#: Least agreement (intersection over union) with the ideal outline in the same bounding box.
LEAST_OVERLAP = 0.84
#: A triangle's tip may be blunt, for small pictures have no room for a sharp one: its width by the base's.
BLUNT = 0.35


@dataclass(frozen=True)
class Seen:
    """What a picture shows; None where it is no clear case of anything known."""

    shape: str | None
    colour: str | None
    background: str | None


def look(picture: Pixels) -> Seen:
    """Reads a picture.

    Args:
        picture: [height, width, 3] in 0..255, at least 64 pixels each way.
    """
    edge = max(1, min(picture.shape[:2]) // 16)
    border = np.concatenate(
        [
            picture[:edge].reshape(-1, 3),
            picture[-edge:].reshape(-1, 3),
            picture[:, :edge].reshape(-1, 3),
            picture[:, -edge:].reshape(-1, 3),
        ]
    ).astype(float)
    behind = np.median(border, axis=0)
    calm = np.mean(np.abs(border - behind).max(axis=1) < 60) > 0.85
    if not calm:
        return Seen(None, None, None)
    background = name_colour(behind)
    mask = largest_part(smooth(foreground(picture, behind)))
    if mask.mean() < 0.03:
        return Seen(None, None, background)
    inside = picture[core(mask)].astype(float)
    front = np.median(inside, axis=0)
    even = np.mean(np.abs(inside - front).max(axis=1) < 60) > 0.8
    return Seen(name_shape(mask), name_colour(front) if even else None, background)


def name_colour(rgb: npt.NDArray[np.float64]) -> str | None:
    """The name of a colour; None for greys, browns and other dull ones."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in rgb))
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.8 else None
    if saturation < 0.45 or value < 0.4:
        return None
    return next(name for end, name in HUES if hue * 360 < end)


def foreground(picture: Pixels, behind: npt.NDArray[np.float64]) -> Mask:
    """What differs from the background: more than half as far from it as the picture's farthest pixels."""
    distance = np.linalg.norm(picture.astype(float) - behind, axis=2)
    far = float(np.quantile(distance, 0.97))
    different: Mask = distance > max(30.0, far / 2)
    return different


def smooth(mask: Mask) -> Mask:
    """Without the spurs of a pixel that would widen the bounding box: less than four of nine neighbours."""
    padded = np.pad(mask, 1).astype(np.int64)
    height, width = mask.shape
    votes = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    kept: Mask = np.asarray(votes) >= 4
    return kept


def largest_part(mask: Mask) -> Mask:
    """The largest 4-connected part of a mask; an empty mask stays empty."""
    height, width = mask.shape
    labels = np.zeros(mask.shape, dtype=np.int64)
    best, best_size, label = 0, 0, 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        label += 1
        labels[start] = label
        todo, size = [start], 0
        while todo:
            y, x = todo.pop()
            size += 1
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= ny < height and 0 <= nx < width and mask[ny, nx] and not labels[ny, nx]:
                    labels[ny, nx] = label
                    todo.append((ny, nx))
        if size > best_size:
            best, best_size = label, size
    part: Mask = (labels == best) & (labels > 0)
    return part


def core(mask: Mask) -> Mask:
    """The mask without its rim of two pixels, where colours mix; all of it where nothing would be left."""
    inner = mask.copy()
    for _ in range(2):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner if inner.any() else mask


def name_shape(mask: Mask) -> str | None:
    """The shape whose ideal outline in the mask's bounding box agrees best, if it agrees well."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    if min(height, width) < 6 or not 0.7 < width / height < 1.43:
        return None
    y, x = np.mgrid[0:height, 0:width]
    v, u = (y + 0.5) / height, (x + 0.5) / width
    ideals = {
        "circle": (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25,
        "square": np.ones(box.shape, dtype=bool),
    }
    tip = float(box[: max(1, height // 10)].sum(axis=1).mean()) / width
    if tip <= BLUNT:
        ideals["triangle"] = np.abs(u - 0.5) <= (tip + (1 - tip) * v) / 2
    overlaps = {name: float((box & ideal).sum() / (box | ideal).sum()) for name, ideal in ideals.items()}
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= LEAST_OVERLAP else None
