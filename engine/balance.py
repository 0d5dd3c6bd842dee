"""How evenly experts are used: pure functions of counted loads.

Balancedness is the mean load over the largest one, between 0 and 1: with 0.5 the busiest GPU has twice the
mean work, and since all wait for it, half of the others' time is lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def balancedness(loads: NDArray[Any]) -> Floats:
    """Mean over maximum of each layer.

    Args:
        loads: [layers, parts], non-negative: the tokens of each expert, rank or GPU.

    Returns:
        [layers]; 1.0 for a layer without any load.
    """
    most = loads.max(axis=1).astype(np.float64)
    means = loads.mean(axis=1)
    return np.where(most > 0, means / np.where(most > 0, most, 1.0), 1.0)


def overall(loads: NDArray[Any]) -> float | None:
    """Balancedness of all layers in one figure: layers run one after the other, so their maxima add up.

    It is what vLLM logs (`eplb_state.py`): the sum of the layers' means over the sum of their maxima.

    Args:
        loads: [layers, parts], non-negative.

    Returns:
        None while there is no load at all.
    """
    most = float(loads.max(axis=1).sum())
    return float(loads.mean(axis=1).sum()) / most if most > 0 else None


def on_ranks(loads: NDArray[Any], ranks: int) -> NDArray[Any]:
    """The load of each rank when experts are dealt out in their order.

    Args:
        loads: [layers, experts].
        ranks: expert-parallel ranks; the first ones have an expert more where they do not divide evenly, as
            vLLM's linear placement has it.

    Returns:
        [layers, ranks].
    """
    parts = np.array_split(np.arange(loads.shape[1]), ranks)
    return np.stack([loads[:, part].sum(axis=1) for part in parts], axis=1)
