"""The balancing benchmark: its loads are what they are called, and what it calls missed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.eplb import TIME_BUDGET_S, TOKENS, Shape, compare, hot, measure, missed, shifted, zipf

SMALL = Shape("small", layers=2, experts=64, per_token=4, groups=4)


def dice() -> np.random.Generator:
    return np.random.default_rng(1)


def test_loads_are_skewed_and_have_all_tokens() -> None:
    for make, times in ((zipf, 20), (hot, 12)):
        loads = make(SMALL, dice())
        assert loads.shape == (2, 64) and (loads.sum(axis=1) == TOKENS * 4).all()
        assert (loads.max(axis=1) > times * np.median(loads, axis=1) / 2).all()
    loads = zipf(SMALL, dice())
    moved = shifted(loads, dice())
    assert (np.sort(moved) == np.sort(loads)).all()
    assert ((moved != loads).sum(axis=1) <= 6).all() and (moved != loads).any()


def test_a_comparison_finds_balance_better_than_linear() -> None:
    loads = zipf(SMALL, dice())
    row = compare(SMALL, 16, loads, loads)
    assert (row["nodes"], row["redundant"], row["layers_worse_than_linear"]) == (2, 32, 0)
    assert row["linear"]["mean"] < row["hierarchical"]["mean"] <= row["global"]["mean"] <= 1
    assert row["linear"]["worst"] <= row["linear"]["mean"]


def test_what_is_missed_is_told() -> None:
    results = measure((SMALL,), (4,))
    assert list(results) == ["zipf", "shifting", "hot"] and missed(results) == []
    results["zipf"][0] |= {"plan_s": TIME_BUDGET_S + 0.1}
    results["hot"][0] |= {"layers_worse_than_linear": 1}
    results["shifting"][0] |= {"layers_worse_than_linear": 1}
    slow, worse = missed(results)
    assert "small on 4 GPUs (zipf): a plan took" in slow and "1 layers are worse" in worse


@pytest.mark.parametrize("gpus", [8, 16])
def test_models_without_groups_have_no_hierarchy(gpus: int) -> None:
    plain: Any = Shape("plain", layers=1, experts=64, per_token=4, groups=1)
    row = compare(plain, gpus, hot(plain, dice()), hot(plain, dice()))
    assert "hierarchical" not in row and "global" in row
