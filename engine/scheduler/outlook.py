"""How a unit looks from outside: its state with the reason, and roughly how long until it is ready."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.routes import ReplicaState
from engine.scheduler.starts import expected_s, expected_wake_s
from engine.scheduler.units import Progress, Unit, World

#: How far along a state is; the furthest replica speaks for its model.
_ORDER: tuple[ReplicaState, ...] = (
    "stopped",
    "failed",
    "backoff",
    "planned",
    "preparing",
    "draining",
    "starting",
    "warming",
    "asleep",
    "waking",
    "ready",
)

_STAGES = {
    "download": "downloading its weights",
    "convert": "converting its weights",
    "verify": "checking its weights",
}


@dataclass(frozen=True)
class Outlook:
    """``eta_s``: seconds until ready, None = unknown or never."""

    state: ReplicaState
    reason: str
    since: float
    eta_s: float | None
    progress: Progress | None = None
    #: More on the reason, for the operator's eyes.
    detail: str = ""
    log_tail: tuple[str, ...] = ()

    @property
    def full_reason(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

    @property
    def rank(self) -> int:
        return _ORDER.index(self.state)


def outlook(world: World, unit: Unit, now: float) -> Outlook:
    """The outlook of a runner or a gateway worker."""
    if world.stop and unit.state in ("planned", "backoff", "failed"):
        return Outlook("stopped", "stopping", unit.since, None)
    if unit.state == "ready":
        return Outlook("ready", "", unit.since, 0.0)
    expected = expected_s(world, unit)
    if unit.state in ("starting", "warming"):
        doing = "loading the model" if unit.state == "starting" else "answering its first request"
        reason = doing if unit.kind == "runner" else "starting"
        reason += f" again: {unit.after}" if unit.after else ""
        return Outlook(unit.state, reason, unit.since, _left(expected, now - unit.started_at))
    if unit.state == "asleep":
        asked = unit.model in world.demands
        reason = "asleep; waiting until there is room" if asked else "asleep; the first request wakes it"
        return Outlook("asleep", reason, unit.since, expected_wake_s(world, unit))
    if unit.state == "waking":
        left = _left(expected_wake_s(world, unit), now - unit.since)
        return Outlook("waking", "waking up", unit.since, left)
    if unit.withdrawal:
        return Outlook(unit.state, unit.reason, unit.since, expected_wake_s(world, unit))
    if unit.state in ("failed", "backoff"):
        wait = max(0.0, unit.retry_at - now)
        seen = Outlook(unit.state, unit.reason, unit.since, wait + expected)
        return replace(seen, detail=unit.detail, log_tail=unit.log_tail)
    if unit.state == "draining":
        again = unit.ending is not None and unit.ending.then == "planned"
        return Outlook("draining", unit.reason, unit.since, expected if again else None)
    if unit.state == "planned":
        return _waiting(world, unit, expected, now)
    return Outlook(unit.state, unit.reason, unit.since, None)


def _waiting(world: World, unit: Unit, expected: float, now: float) -> Outlook:
    if unit.waits:
        return Outlook("planned", f"waiting for {', '.join(sorted(unit.waits))} to end", unit.since, None)
    weights = world.units.get(unit.needs) if unit.needs else None
    if weights is None or weights.state == "ready":
        return Outlook(
            "planned", "waiting for its turn to load", unit.since, _queue_s(world, unit, now) + expected
        )
    if weights.state in ("failed", "backoff"):
        wait = max(0.0, weights.retry_at - now)
        seen = Outlook("failed", "its weights could not be prepared", weights.since, wait + expected)
        return replace(seen, detail=weights.detail or weights.reason, log_tail=weights.log_tail)
    if weights.state == "starting":
        progress = weights.progress
        left = _preparation_left(progress, now - weights.started_at)
        # The progress's own message may name folders: it is in the status, not in the answers of the API.
        reason = _STAGES.get(progress.stage, "") if progress else ""
        eta = None if left is None else left + expected
        return Outlook("preparing", reason or "preparing its weights", weights.since, eta, progress)
    return Outlook("planned", "waiting for its weights", unit.since, None)


def _left(expected: float, elapsed: float) -> float:
    """What is left of an expected time; one overdue is guessed to need a quarter of what it took so far."""
    return max(1.0, expected - elapsed) if elapsed < expected else max(1.0, elapsed / 4)


def _queue_s(world: World, unit: Unit, now: float) -> float:
    """Until the first of those that load on the same device is through."""
    loading = [other for other in world.of_kind("runner") if other.starting and other.device == unit.device]
    if len(loading) < world.policy.concurrent_starts:
        return 0.0
    return min(_left(expected_s(world, other), now - other.started_at) for other in loading)


def _preparation_left(progress: Progress | None, elapsed: float) -> float | None:
    if progress is None or not progress.total or progress.done <= 0:
        return None
    return elapsed * max(0.0, progress.total - progress.done) / progress.done


def model_outlook(world: World, replicas: list[Unit], now: float) -> Outlook:
    """The outlook of a model: that of the replica that is furthest along, or will be ready first."""

    def key(seen: Outlook) -> tuple[int, float]:
        return seen.rank, -(seen.eta_s if seen.eta_s is not None else 1e9)

    return max((outlook(world, unit, now) for unit in replicas), key=key)
