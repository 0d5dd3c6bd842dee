"""A runner's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Instruments:
    """The metrics of one runner; also the observer of its batchers and of its sleep."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "hearth_runner_requests", "Requests answered, by status.", ["status"], registry=registry
        )
        self.request_seconds = Histogram(
            "hearth_runner_request_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("hearth_runner_in_flight", "Requests being served.", registry=registry)
        self.batch_size = Histogram(
            "hearth_runner_batch_size", "Works that ran together.", buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "hearth_runner_batch_seconds", "Seconds a batch ran.", buckets=_SECONDS, registry=registry
        )
        self.queue_waiting = Gauge(
            "hearth_runner_queue_waiting", "Works waiting for a batch.", registry=registry
        )
        self.queue_wait_seconds = Histogram(
            "hearth_runner_queue_wait_seconds",
            "Seconds a work waited for its batch.",
            buckets=_SECONDS,
            registry=registry,
        )

        self.asleep = Gauge(
            "hearth_runner_asleep", "1 while its memory is given back, else 0.", registry=registry
        )
        self.sleep_seconds = Histogram(
            "hearth_runner_sleep_seconds",
            "Seconds it took to fall asleep.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.wake_seconds = Histogram(
            "hearth_runner_wake_seconds", "Seconds it took to wake.", buckets=_SECONDS, registry=registry
        )

    def queued(self, waiting: int) -> None:
        self.queue_waiting.set(waiting)

    def ran(self, size: int, waits_s: Sequence[float], seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)
        for wait in waits_s:
            self.queue_wait_seconds.observe(wait)

    def answered(self, status: int, seconds: float) -> None:
        self.requests.labels(status=str(status)).inc()
        self.request_seconds.observe(seconds)

    def slept(self, seconds: float) -> None:
        self.asleep.set(1)
        self.sleep_seconds.observe(seconds)

    def woke(self, seconds: float) -> None:
        self.asleep.set(0)
        self.wake_seconds.observe(seconds)

    def text(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
