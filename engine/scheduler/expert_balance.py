"""How evenly a mixture of experts is loaded, read from a runner's /metrics: pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families

from engine.routes import ExpertBalance
from engine.runners.expert_load import LAYER, OVERALL


def parse_balance(text: str) -> ExpertBalance | None:
    """The balance that a runner tells; None where it tells none (yet), or no Prometheus text at all.

    Over ranks where several hold different experts: that is what costs time. Else over experts, which says
    what it would be with one expert a rank.
    """
    # Most of the page is the engine's own; only our lines are parsed.
    ours = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(LAYER))
    found: dict[str, float] = {}
    layers: dict[str, list[tuple[float, int]]] = {}
    try:
        for family in text_string_to_metric_families(ours):
            for sample in family.samples:
                over = sample.labels.get("over", "")
                if sample.name == OVERALL:
                    found[over] = sample.value
                elif sample.name == LAYER:
                    layers.setdefault(over, []).append((sample.value, int(sample.labels["layer"])))
    except (ValueError, KeyError):
        return None
    views: tuple[Literal["ranks", "experts"], ...] = ("ranks", "experts")
    for over in views:
        if over in found:
            worst, layer = min(layers.get(over, []), default=(None, None))
            return ExpertBalance(
                over=over,
                overall=round(found[over], 3),
                worst=None if worst is None else round(worst, 3),
                worst_layer=layer,
            )
    return None


def worst_of(balances: Iterable[ExpertBalance | None]) -> ExpertBalance | None:
    """Of a model's replicas, the one that is loaded least evenly; None where none tells."""
    return min((b for b in balances if b is not None), key=lambda b: b.overall, default=None)
