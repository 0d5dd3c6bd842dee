"""`python -m benchmarks.eplb`: how even EPLB makes the load of GPUs, against linear placement, and how fast.

Synthetic loads: *zipf* (expert popularity falls as 1/rank^0.8, another order in each layer), *hot* (a few
experts of each layer have sixteen times the others' load) and *shifting* (the placement is made from a zipf
load and judged when a tenth of the experts have changed places). Placements: linear without copies (what vLLM
does without EPLB), permuted (balanced without copies), and balanced with redundant experts, global and, for
models with expert groups on several nodes, hierarchical. Balance is a layer's mean load over its largest.
Exit status 1 when a plan takes longer than its budget or a layer is worse than linear.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks._measure import machine, write_result
from engine.balance import Floats, balancedness, on_ranks, overall
from engine.scheduler.eplb import ExpertPlacement, Policy, rebalance, standing

#: vLLM rebalances every few minutes; a plan must be nothing beside that.
TIME_BUDGET_S = 0.25
TOKENS = 1_000_000
_SEED = 11
Dice = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """A model's experts, as its configuration has them."""

    model: str
    layers: int
    experts: int
    per_token: int
    groups: int


SHAPES = (
    Shape("deepseek-r1", layers=58, experts=256, per_token=8, groups=8),
    Shape("qwen3-235b-a22b", layers=94, experts=128, per_token=8, groups=1),
    Shape("kimi-k2", layers=60, experts=384, per_token=8, groups=1),
    Shape("gpt-oss-120b", layers=36, experts=128, per_token=4, groups=1),
)
GPUS = (8, 16, 32, 64)
#: GPUs of one node.
NODE = 8


def zipf(shape: Shape, dice: Dice) -> Floats:
    """Popularity falls as 1/rank^0.8; each layer has its own order."""
    weights = 1.0 / np.arange(1, shape.experts + 1) ** 0.8
    return _counted(np.stack([dice.permutation(weights) for _ in range(shape.layers)]), shape, dice)


def hot(shape: Shape, dice: Dice) -> Floats:
    """One expert in 32 has sixteen times the load of the others."""
    weights = np.ones((shape.layers, shape.experts))
    for row in weights:
        row[dice.choice(shape.experts, shape.experts // 32, replace=False)] = 16.0
    return _counted(weights, shape, dice)


def _counted(weights: Floats, shape: Shape, dice: Dice) -> Floats:
    """So many routed tokens, dealt by these weights."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    return np.stack([dice.multinomial(TOKENS * shape.per_token, row) for row in shares]).astype(np.float64)


def shifted(loads: Floats, dice: Dice) -> Floats:
    """A tenth of each layer's experts have changed places."""
    moved = loads.copy()
    for row in moved:
        chosen = dice.choice(len(row), max(2, len(row) // 10), replace=False)
        row[chosen] = row[np.roll(chosen, 1)]
    return moved


def figures(loads: NDArray[Any]) -> dict[str, float]:
    """Of the GPUs' loads [layers, gpus]: balance of all layers, of the mean one, of the worst one."""
    layers = balancedness(loads)
    whole = overall(loads)
    assert whole is not None, "there are tokens"
    return {
        "overall": round(whole, 4),
        "mean": round(float(layers.mean()), 4),
        "worst": round(float(layers.min()), 4),
    }


def compare(shape: Shape, gpus: int, planned: Floats, served: Floats) -> dict[str, Any]:
    """Placements made from ``planned``, judged by ``served``; seconds of the slowest plan."""
    nodes = max(1, gpus // NODE)
    redundant = -(-32 // gpus) * gpus
    plans: dict[str, tuple[int, Policy]] = {"permuted": (0, "global"), "global": (redundant, "global")}
    if nodes > 1 and shape.groups % nodes == 0:
        plans["hierarchical"] = (redundant, "hierarchical")
    linear = on_ranks(served, gpus)
    row: dict[str, Any] = {
        "model": shape.model, "gpus": gpus, "nodes": nodes, "redundant": redundant, "linear": figures(linear)
    }  # fmt: skip
    slowest, worse = 0.0, 0
    for name, (copies, policy) in plans.items():
        began = time.perf_counter()
        made = rebalance(
            planned, gpus=gpus, nodes=nodes, groups=shape.groups, redundant=copies, policy=policy
        )
        slowest = max(slowest, time.perf_counter() - began)
        judged: ExpertPlacement = standing(served, made.physical_to_logical, gpus=gpus)
        row[name] = figures(judged.gpu_loads)
        worse += int((judged.gpu_loads.max(axis=1) > linear.max(axis=1) * (1 + 1e-9)).sum())
    return row | {"plan_s": round(slowest, 4), "layers_worse_than_linear": worse}


def measure(shapes: tuple[Shape, ...], gpus: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
    """Every kind of load on every shape and size."""
    kinds: dict[str, Callable[[Shape, Dice], Floats]] = {"zipf": zipf, "hot": hot}
    results: dict[str, list[dict[str, Any]]] = {}
    for kind, make in kinds.items():
        for shape in shapes:
            loads = make(shape, np.random.default_rng(_SEED))
            results.setdefault(kind, []).extend(compare(shape, count, loads, loads) for count in gpus)
            if kind == "zipf":
                later = shifted(loads, np.random.default_rng(_SEED + 1))
                rows = results.setdefault("shifting", [])
                rows.extend(compare(shape, count, loads, later) for count in gpus)
    return results


def missed(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What is not as promised, in words. Loads that have shifted since the plan promise nothing."""
    found = []
    for kind, rows in results.items():
        for row in rows:
            where = f"{row['model']} on {row['gpus']} GPUs ({kind})"
            if row["plan_s"] > TIME_BUDGET_S:
                found.append(f"{where}: a plan took {row['plan_s']:.2f} s; the budget is {TIME_BUDGET_S} s")
            if kind != "shifting" and row["layers_worse_than_linear"]:
                found.append(f"{where}: {row['layers_worse_than_linear']} layers are worse than linear")
    return found


def show(results: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """Mean and worst layer of each placement."""
    names = ("linear", "permuted", "global", "hierarchical")
    for kind, rows in results.items():
        table = Table(title=f"{kind}: balance of the mean / worst layer")
        for name in ("model", "GPUs", "redundant", *names, "plan, ms"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for row in rows:
            cells = [f"{row[n]['mean']:.2f} / {row[n]['worst']:.2f}" if n in row else "" for n in names]
            head = (row["model"], str(row["gpus"]), str(row["redundant"]))
            table.add_row(*head, *cells, f"{row['plan_s'] * 1000:.0f}")
        console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eplb", description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    given = parser.parse_args()
    console = Console()
    results = measure(SHAPES, tuple(given.gpus))
    show(results, console)
    faults = missed(results)
    document = {"machine": machine(), "tokens": TOKENS, "time_budget_s": TIME_BUDGET_S, "loads": results}
    console.print(f"Written to {write_result('eplb', document)}.")
    for fault in faults:
        console.print(f"Missed: {fault}.", style="red")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
