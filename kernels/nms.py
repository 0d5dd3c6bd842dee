"""Non-maximum suppression in plain torch, for where torchvision's compiled operator cannot load.

Why: torchvision from the package index is a CUDA build; beside a CPU torch its operators do not exist, while
ultralytics calls ``torchvision.ops.nms`` whenever torchvision can be imported.

The algorithm is the greedy one of torchvision's CPU kernel (``torchvision/csrc/ops/cpu/nms_kernel.cpp``): go
through the boxes by falling score and drop every later box that overlaps a kept one by more than the
threshold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Boxes settled at once.
BLOCK = 256

#: Registrations end when their library object is collected.
_registered: list[Any] = []


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that are kept.

    Args:
        boxes: shape (n, 4), corners x1, y1, x2, y2.
        scores: shape (n,).
        iou_threshold: a box is dropped when its IoU with a better kept one is above this.

    Returns:
        int64 of shape (kept,), by falling score; equal scores keep their order.

    Raises:
        ValueError: the shapes do not fit.

    Boxes are taken in blocks of :data:`BLOCK`: one matrix of overlaps inside the block settles which of it
    are kept, one more against the boxes that are left drops those. O(n²) time at worst, O(n · BLOCK) memory.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"boxes must be (n, 4) and scores (n,), not {tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    order = scores.argsort(descending=True, stable=True)
    # Half precision would round areas of large boxes to infinity.
    left = boxes[order].to(torch.promote_types(boxes.dtype, torch.float32))
    kept = []
    while len(order):
        block, rest = left[:BLOCK], left[BLOCK:]
        stays = _settle(_overlaps(block, block) > iou_threshold)
        kept.append(order[:BLOCK][stays])
        free = ~(_overlaps(block[stays], rest) > iou_threshold).any(0)
        left, order = rest[free], order[BLOCK:][free]
    return torch.cat(kept) if kept else order


def _settle(over: Tensor) -> Tensor:
    """Which boxes of a block are kept, given which overlap; both by falling score."""
    matrix = over.cpu().numpy()
    stays = np.ones(len(matrix), dtype=np.bool_)
    for index in range(len(matrix)):
        if stays[index]:
            stays[index + 1 :] &= ~matrix[index, index + 1 :]
    return torch.from_numpy(stays).to(over.device)


def _overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU of each pair, shape (len(first), len(second)).

    Two boxes without area give 0 / 0: NaN is not above any threshold, so both stay, as in torchvision.
    """
    a, b = first[:, None], second[None]
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    common = width.mul_(height)
    return common / (_areas(first)[:, None] + _areas(second)[None] - common)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def install() -> bool:
    """Makes ``torchvision.ops.nms`` work on CPU where torchvision's compiled part has not loaded.

    Returns whether it had to do anything: with a torchvision that loads it touches nothing. Call it once,
    before detection; the operator's schema is defined by ``engine/runners/shim``, without which torchvision's
    import itself fails (RuntimeError).
    """
    import torchvision.extension

    if torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        return False
    library_class: Any = torch.library.Library  # torch's own annotations are incomplete here
    implementation = library_class("torchvision", "IMPL")
    implementation.impl("nms", nms, "CPU")
    _registered.append(implementation)
    torchvision.extension._has_ops = lambda: True
    return True
