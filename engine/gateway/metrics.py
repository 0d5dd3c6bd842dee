"""The gateway's own Prometheus metrics.

With several workers prometheus_client keeps the values in files of one folder (PROMETHEUS_MULTIPROC_DIR,
which must be set before that library is imported), and any worker's /metrics tells the sum of all.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from engine.gateway.exchange import Exchange
from engine.gateway.loading import remaining_s
from engine.gateway.routing import Directory
from engine.routes import ReplicaState

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PID = re.compile(r"_(\d+)\.db$")


class GatewayMetrics:
    """Counts requests and their times."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "hearth_gateway_requests",
            "Requests answered, by the status sent (499: the client left before).",
            ("endpoint", "model", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "hearth_gateway_request_seconds",
            "From the request's first line to the answer's last byte, seconds.",
            ("endpoint", "model"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_byte = Histogram(
            "hearth_gateway_first_byte_seconds",
            "From the request's first line to the answer's first byte, seconds.",
            ("endpoint", "model"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "hearth_gateway_in_flight",
            "Requests that are with a runner now.",
            ("model",),
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._sent = Counter(
            "hearth_gateway_sent_bytes", "Bytes of answers' bodies.", ("endpoint",), registry=registry
        )
        self._received = Counter(
            "hearth_gateway_received_bytes", "Bytes of requests' bodies.", ("endpoint",), registry=registry
        )
        self._lost = Counter(
            "hearth_gateway_runner_losses",
            "Replicas that were not reached or left in mid-request.",
            ("model",),
            registry=registry,
        )
        self._waiting = Gauge(
            "hearth_gateway_waiting",
            "Requests that wait for their model to wake.",
            ("model",),
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._waits = Histogram(
            "hearth_gateway_wake_wait_seconds",
            "How long requests waited for their model to wake, however the wait ended, seconds.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._queued = Gauge(
            "hearth_queue_waiting",
            "Requests that wait for their turn at the model's replicas.",
            ("model",),
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._queue_waits = Histogram(
            "hearth_queue_wait_seconds",
            "How long requests that had to wait for their turn did so, however the wait ended, seconds.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._backlog = Gauge(
            "hearth_ledger_backlog_rows",
            "Answered requests that are in the local journal and not yet in the database.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._away = Gauge(
            "hearth_ledger_database_away",
            "Workers whose ledger does not reach its database now.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        # Looking children up by their labels costs more than counting does.
        self._times: dict[tuple[str, str], tuple[Histogram, Histogram]] = {}
        self._counts: dict[tuple[str, str, int], Counter] = {}
        self._gauges: dict[str, Gauge] = {}

    def in_flight(self, model: str) -> Gauge:
        """The gauge of one model's requests that are with a runner."""
        gauge = self._gauges.get(model)
        if gauge is None:
            gauge = self._gauges[model] = self._in_flight.labels(model)
        return gauge

    def waiting(self, model: str) -> Gauge:
        """The gauge of one model's requests that wait for it to wake."""
        return self._waiting.labels(model)

    def waited(self, model: str, seconds: float) -> None:
        """A request has waited for the model to wake."""
        self._waits.labels(model).observe(seconds)

    def queued(self, model: str, more: int) -> None:
        """So many more requests wait for their turn at the model's replicas."""
        self._queued.labels(model).inc(more)

    def queue_waited(self, model: str, seconds: float) -> None:
        """A request has waited for its turn."""
        self._queue_waits.labels(model).observe(seconds)

    def lost(self, model: str) -> None:
        self._lost.labels(model).inc()

    def ledger(self, backlog: int, *, away: bool) -> None:
        """How this worker's ledger stands, looked at now and then."""
        self._backlog.set(backlog)
        self._away.set(away)

    def observe(self, exchange: Exchange, status: int) -> None:
        """Counts one finished request."""
        endpoint, model = exchange.endpoint, exchange.model
        count = self._counts.get((endpoint, model, status))
        if count is None:
            count = self._requests.labels(endpoint, model, str(status))
            self._counts[(endpoint, model, status)] = count
        count.inc()
        times = self._times.get((endpoint, model))
        if times is None:
            times = (self._seconds.labels(endpoint, model), self._first_byte.labels(endpoint, model))
            self._times[(endpoint, model)] = times
        times[0].observe(exchange.elapsed_s())
        if exchange.first_byte_s is not None:
            times[1].observe(exchange.first_byte_s)
        if exchange.bytes_out:
            self._sent.labels(endpoint).inc(exchange.bytes_out)
        if exchange.bytes_in:
            self._received.labels(endpoint).inc(exchange.bytes_in)

    def text(self, directory: Directory) -> bytes:
        """Prometheus text: what was counted, and the state of every model."""
        registry = self._registry
        if MULTIPROCESS in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # the library has no types here
        states = CollectorRegistry()
        states.register(_States(directory))
        return generate_latest(registry) + generate_latest(states)


class _States(Collector):
    """The route table as gauges, read when it is asked for."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        state = GaugeMetricFamily(
            "hearth_model_state",
            "1 for the state a model is in, 0 for the others.",
            labels=("model", "category", "state"),
        )
        ready = GaugeMetricFamily(
            "hearth_model_ready_replicas", "Replicas that take requests.", labels=("model",)
        )
        eta = GaugeMetricFamily(
            "hearth_model_ready_in_seconds", "Roughly how long until it is ready.", labels=("model",)
        )
        even = GaugeMetricFamily(
            "hearth_model_expert_balancedness",
            "Mean over largest load of a mixture of experts: all layers together, and the least even one.",
            labels=("model", "over", "layers"),
        )
        now = time.time()
        for served in self._directory:
            route = served.route
            for name in get_args(ReplicaState):
                state.add_metric((route.id, route.category, name), float(route.state == name))
            ready.add_metric((route.id,), len(served.upstreams))
            left = remaining_s(route, now)
            if left is not None and not served.upstreams:
                eta.add_metric((route.id,), left)
            if (found := route.expert_balance) is not None:
                even.add_metric((route.id, found.over, "all"), found.overall)
                if found.worst is not None:
                    even.add_metric((route.id, found.over, "worst"), found.worst)
        return (state, ready, eta, even)


def forget_the_dead(folder: Path) -> None:
    """Ends the gauges of workers that live no more; their counters stay in the sums."""
    for file in folder.glob("gauge_live*.db"):
        found = _PID.search(file.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            mark_process_dead(int(found[1]), str(folder))  # type: ignore[no-untyped-call]  # untyped library
