"""How many tokens each expert has had, as the engine counts it, read for a runner's /metrics.

On a CPU our own experts (``kernels/moe``) count into memory-mapped files, one a rank: ``PATH.<rank>``, where
``PATH`` is ``HEARTH_EXPERT_LOAD``. Two int64 (layers, experts), then the counts since the start, int64, row
after row. On GPUs vLLM counts for its own load balancer (EPLB) and only logs the balancedness; what it logged
last is in ``PATH.reported`` (:mod:`engine.runners.expert_log`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.balance import balancedness, on_ranks, overall
from engine.runners import scratch
from engine.runners.spec import RunnerSpec

VARIABLE = "HEARTH_EXPERT_LOAD"
OVERALL = "hearth_expert_balancedness_overall"
LAYER = "hearth_expert_balancedness"
TOKENS = "hearth_expert_tokens"
#: More (layer, expert) pairs than this are too many series; then only the balancedness is told.
MOST_SERIES = 2048
_HEADER_BYTES = 16
#: Nobody has more layers or experts; a file that says so is not one of ours.
_MOST = 1 << 16

Counts = NDArray[np.int64]


def path_of(socket: Path) -> Path:
    """Where the engine of the runner on ``socket`` counts, less the rank."""
    return scratch.folder_of(socket) / "experts"


def ranks_of(spec: RunnerSpec) -> int:
    """Ranks that hold different experts of a vLLM runner, from its options.

    1 where every process has its part of every expert: then their balance costs nothing.
    """
    table = {key.replace("_", "-"): value for key, value in spec.options.get("args", {}).items()}
    if not table.get("enable-expert-parallel"):
        return 1
    devices = len(spec.device.partition(":")[2].split(","))
    data = int(table.get("data-parallel-size", 1))
    return data * int(table.get("tensor-parallel-size", max(1, devices // data)))


def read_counts(path: Path) -> Counts | None:
    """Tokens of each (layer, expert) so far: [layers, experts], or None while nothing was counted.

    Every rank sees the routing of all tokens (under data parallelism vLLM gathers them for the experts), so
    the furthest of them has the truth.
    """
    found = [counts for file in _files(path) if (counts := _read(file)) is not None]
    if len({counts.shape for counts in found}) != 1:
        return None
    return np.asarray(np.stack(found).max(axis=0), dtype=np.int64)


def _files(path: Path) -> list[Path]:
    files = [file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdigit()]
    return sorted(files, key=lambda file: int(file.suffix[1:]))


def _read(file: Path) -> Counts | None:
    try:
        data = file.read_bytes()
    except OSError:
        return None
    if len(data) < _HEADER_BYTES:
        return None  # being made
    layers, experts = (int(n) for n in np.frombuffer(data, dtype="<i8", count=2))
    if not (0 < layers < _MOST and 0 < experts < _MOST) or len(data) < _HEADER_BYTES + 8 * layers * experts:
        return None
    body = np.frombuffer(data, dtype="<i8", offset=_HEADER_BYTES, count=layers * experts)
    return body.astype(np.int64).reshape(layers, experts)


def read_reported(path: Path) -> float | None:
    """The balancedness over ranks that the engine itself reported last; None = it has not."""
    try:
        return float(json.loads(reported_file(path).read_bytes())["balancedness"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reported_file(path: Path) -> Path:
    return path.with_name(path.name + ".reported")


def metrics_text(path: Path, ranks: int) -> bytes:
    """Prometheus text of the experts' loads; empty while there are none."""
    counts = read_counts(path)
    families: list[Metric] = []
    if counts is not None:
        families += _counted(counts, ranks)
    elif (reported := read_reported(path)) is not None:
        families.append(_overall([("ranks", reported)]))
    if not families:
        return b""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


def _counted(counts: Counts, ranks: int) -> list[Metric]:
    views: list[tuple[str, NDArray[Any]]] = [("experts", counts)]
    if 1 < ranks <= counts.shape[1]:
        views.append(("ranks", on_ranks(counts, ranks)))
    layers = GaugeMetricFamily(
        LAYER,
        "Mean over largest load of a layer since the start: over experts, and over the ranks that hold them.",
        labels=("layer", "over"),
    )
    for over, loads in views:
        for number, value in enumerate(balancedness(loads)):
            layers.add_metric((str(number), over), float(value))
    families: list[Metric] = [layers]
    told = [(over, value) for over, loads in views if (value := overall(loads)) is not None]
    if told:
        families.append(_overall(told))
    if counts.size <= MOST_SERIES:
        families.append(_tokens(counts))
    return families


def _overall(values: Sequence[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        OVERALL, "Sum of the layers' mean loads over the sum of their largest.", labels=("over",)
    )
    for over, value in values:
        family.add_metric((over,), value)
    return family


def _tokens(counts: Counts) -> CounterMetricFamily:
    family = CounterMetricFamily(TOKENS, "Tokens that each expert has had.", labels=("layer", "expert"))
    for layer, row in enumerate(counts):
        for expert, count in enumerate(row):
            family.add_metric((str(layer), str(expert)), float(count))
    return family


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
