"""Non-maximum suppression against a naive loop, and its place as torchvision's operator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels.nms
from kernels.nms import nms

ROOT = Path(__file__).resolve().parents[2]
Box = tuple[float, float, float, float]


def iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def naive(boxes: list[Box], scores: list[float], threshold: float) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


# Whole numbers and eighths: every area and IoU here is the same in float32 and in Python's floats.
corner = st.integers(0, 24).map(float)
side = st.integers(0, 12).map(float)
box = st.tuples(corner, corner, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@given(
    st.lists(st.tuples(box, st.integers(0, 8).map(lambda n: n / 8)), max_size=40),
    st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]),
)
def test_it_keeps_what_the_naive_loop_keeps(rows: list[tuple[Box, float]], threshold: float) -> None:
    boxes = [row[0] for row in rows]
    scores = [row[1] for row in rows]
    expected = naive(boxes, scores, threshold)
    for block in (1, 3, 256):
        with mock.patch.object(kernels.nms, "BLOCK", block):
            kept = nms(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), threshold)
        assert kept.dtype == torch.int64
        assert kept.tolist() == expected


def test_the_threshold_itself_is_not_above_it() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 1], [1.0, 0, 2, 1]])  # IoU exactly 0.5
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.49).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    # In half precision these areas alone would overflow.
    boxes = torch.tensor([[0, 0, 1000, 1000], [0, 0, 1000, 992], [2000, 0, 3000, 1000]], dtype=dtype)
    assert nms(boxes, torch.tensor([0.5, 1.0, 0.25], dtype=dtype), 0.5).tolist() == [1, 2]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="boxes must be"):
        nms(torch.zeros(3, 5), torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match="boxes must be"):
        nms(torch.zeros(3, 4), torch.zeros(2), 0.5)


def test_it_becomes_torchvisions_operator_where_the_compiled_one_is_missing() -> None:
    program = """
import torch
from kernels.nms import install, nms
did = install()
import torchvision
boxes = torch.tensor([[0., 0, 2, 1], [0, 0, 2, 1.25], [5, 5, 6, 6]])
scores = torch.tensor([.1, .9, .5])
assert torchvision.ops.nms(boxes, scores, .5).tolist() == [1, 2]
assert torchvision.ops.batched_nms(boxes, scores, torch.tensor([0, 1, 1]), .5).tolist() == [1, 2, 0]
assert install() is False
print(did, torchvision.__version__)
"""
    paths = f"{ROOT / 'engine/runners/shim'}{os.pathsep}{ROOT}"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    # What the package index offers is a CUDA build, whose compiled part a CPU torch cannot load.
    did, version = ran.stdout.split()
    assert did == str(torch.version.cuda is None and "+cu" in version)
