"""Whether a model's load asks for another number of replicas. Pure, in numbers alone.

Load is high or low for a time without a break before anything follows. Low is less than half of high, and a
number of replicas that was too few for a load is not returned to before the load has halved: so a load that
stays the same never makes replicas come and go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Rules:
    """The numbers of ``[scaling]``."""

    target_in_flight: float = 0.8
    queue_wait_s: float = 1.0
    up_after_s: float = 10.0
    down_after_s: float = 120.0


@dataclass(frozen=True)
class Load:
    """What all gateway workers have for a model."""

    #: In flight and waiting.
    requests: int
    #: The longest of the workers' mean waits for a first byte lately, seconds; 0 = nothing was sent.
    first_byte_s: float = 0.0


@dataclass(frozen=True)
class Bounds:
    fewest: int
    most: int
    #: Most requests that run together in one replica.
    max_batch: int


@dataclass(frozen=True)
class Trend:
    """Since when a model's load has been high or low with this many ready replicas; the loop's clock."""

    ready: int = 0
    high_since: float | None = None
    low_since: float | None = None
    why: str = ""
    #: Requests at the last report.
    load: int = 0
    #: The load, requests, for which so many replicas were too few.
    too_few: Mapping[int, int] = field(default_factory=dict)


def observe(trend: Trend, load: Load, ready: int, bounds: Bounds, rules: Rules, now: float) -> Trend:
    """The trend with one more report; another number of ready replicas begins it anew."""
    if ready != trend.ready:
        trend = Trend(ready, too_few=trend.too_few)
    trend = replace(trend, load=load.requests)
    why = _high(load, ready, bounds, rules)
    if why:
        since = now if trend.high_since is None else trend.high_since
        return replace(trend, high_since=since, low_since=None, why=why)
    if _low(trend, load, ready, bounds, rules):
        since = now if trend.low_since is None else trend.low_since
        return replace(trend, high_since=None, low_since=since, why="little to do")
    return replace(trend, high_since=None, low_since=None, why="")


def _high(load: Load, ready: int, bounds: Bounds, rules: Rules) -> str:
    if not 0 < ready < bounds.most:
        return ""
    most = rules.target_in_flight * bounds.max_batch * ready
    if load.requests > most:
        return f"{load.requests} requests in hand, more than {most:g}"
    # A request that has a replica for itself waits for nobody: another one would not make it faster.
    if load.first_byte_s > rules.queue_wait_s and load.requests > ready:
        return f"first bytes take {load.first_byte_s:.1f} s, more than {rules.queue_wait_s:g}"
    return ""


def _low(trend: Trend, load: Load, ready: int, bounds: Bounds, rules: Rules) -> bool:
    fewer = ready - 1
    if fewer < max(1, bounds.fewest):
        return False
    if load.requests and load.first_byte_s > rules.queue_wait_s and load.requests > fewer:
        return False
    too_few = trend.too_few.get(fewer)
    if too_few is not None and load.requests >= too_few / 2:
        return False
    return load.requests < rules.target_in_flight * bounds.max_batch * fewer / 2


def due(trend: Trend, ready: int, rules: Rules, now: float) -> Literal["more", "fewer"] | None:
    """Whether the trend has lasted long enough."""
    if trend.ready != ready:
        return None
    if trend.high_since is not None and now >= trend.high_since + rules.up_after_s:
        return "more"
    if trend.low_since is not None and now >= trend.low_since + rules.down_after_s:
        return "fewer"
    return None


def begun_anew(trend: Trend) -> Trend:
    """The trend after a step: only what was learnt is left of it."""
    return Trend(trend.ready, too_few=trend.too_few)


def grown(trend: Trend) -> Trend:
    """The trend once another replica has been asked for: so many were too few for this load."""
    known = trend.too_few.get(trend.ready, trend.load)
    return Trend(trend.ready, too_few={**trend.too_few, trend.ready: min(known, trend.load)})
