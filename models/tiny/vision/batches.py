"""Batches of fresh scenes: the same step number always gives the same batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.tiny.vision.drawing import PatchLabels, draw, label_patches, to_pixels
from models.tiny.vision.scenes import Scene, sample_scene

TRAINING_SEED = 20240
# What the training asks about each patch; the fields of PatchLabels.
LABELS = ("shape", "colour", "centre", "background", "same_kind", "same_shape", "same_colour", "total")


@dataclass(frozen=True)
class Sight:
    """Pictures (batch, IMAGE_SIZE, IMAGE_SIZE, 3), 0..255, and patch labels (batch, len(LABELS), patches),
    in the order of LABELS."""

    scenes: list[Scene]
    pixels: Tensor
    labels: Tensor


def step_rng(stage: str, step: int, seed: int = TRAINING_SEED) -> np.random.Generator:
    """The random numbers of one training step; another seed gives scenes that the first has not shown."""
    return np.random.default_rng([seed, len(stage), step])


def draw_batch(rng: np.random.Generator, size: int) -> Sight:
    """So many random scenes, drawn and labelled; those of few shapes, soon learnt, are a little rarer than
    in the exam."""
    scenes = [sample_scene(rng) for _ in range(size)]
    scenes = [sample_scene(rng) if len(s.items) < 3 and rng.random() < 0.5 else s for s in scenes]
    pixels = np.stack([to_pixels(draw(scene, rng)) for scene in scenes])
    labels = np.stack([_stack(label_patches(scene)) for scene in scenes])
    return Sight(scenes, torch.from_numpy(pixels), torch.from_numpy(labels))


def _stack(labels: PatchLabels) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    stacked: np.ndarray[tuple[int, int], np.dtype[np.int64]] = np.stack(
        [np.broadcast_to(getattr(labels, name), labels.shape.shape) for name in LABELS]
    )
    return stacked
