"""The runners' own metrics, gathered from their sockets and told apart by labels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from engine.gateway.routing import Directory
from engine.gateway.upstream import Upstream, UpstreamLostError

_WITHIN_S = 2.0


class Page(NamedTuple):
    """One replica's metrics page; text is None when it did not answer."""

    model: str
    replica: str
    text: str | None


async def scrape(directory: Directory) -> bytes:
    """The metrics of every ready replica as one Prometheus text."""
    pages = await asyncio.gather(
        *(_page(served.route.id, upstream) for served in directory for upstream in served.upstreams)
    )
    return await asyncio.to_thread(merged, pages)


async def _page(model: str, upstream: Upstream) -> Page:
    try:
        return Page(model, upstream.id, await upstream.text("/metrics", within_s=_WITHIN_S))
    except UpstreamLostError:
        return Page(model, upstream.id, None)


def merged(pages: Iterable[Page]) -> bytes:
    """One text of many: a family stands once, its samples bear `hearth_model` and `hearth_replica`."""
    families: dict[str, Metric] = {}
    up = GaugeMetricFamily(
        "hearth_replica_metrics_up",
        "Whether the replica's metrics could be read.",
        labels=("hearth_model", "hearth_replica"),
    )
    for page in pages:
        try:
            found = list(text_string_to_metric_families(page.text)) if page.text is not None else None
        except ValueError:
            # No Prometheus text at all: counted as not answered.
            found = None
        up.add_metric((page.model, page.replica), float(found is not None))
        labels = {"hearth_model": page.model, "hearth_replica": page.replica}
        for family in found or ():
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples.extend(
                sample._replace(labels={**sample.labels, **labels}) for sample in family.samples
            )
    registry = CollectorRegistry()
    registry.register(_Families([up, *families.values()]))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
