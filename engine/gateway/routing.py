"""Which model a name means, and which of its replicas takes the next request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator

from engine.errors import ApiError, nearest
from engine.gateway.upstream import Upstream
from engine.routes import ModelRoute, RouteTable

#: Bounds of `retry-after`, seconds; clients of OpenAI's SDK do not wait longer than two minutes.
LEAST_RETRY_S, MOST_RETRY_S = 1, 120
#: Said when nobody knows how long a model still takes.
UNKNOWN_RETRY_S = 10
_MOST_REASON = 300

_WORDS = {
    "planned": "waiting for its turn to start",
    "preparing": "having its weights fetched or converted",
    "starting": "loading",
    "warming": "loaded and being warmed up",
    "ready": "without a runner at this moment",
    "asleep": "asleep",
    "waking": "waking up",
    "draining": "finishing its last requests before it stops",
    "stopped": "stopped",
    "failed": "failed",
    "backoff": "failed and waiting to be started again",
}


class Served:
    """One model of the table with its replicas."""

    __slots__ = ("_turn", "route", "upstreams")

    def __init__(self, route: ModelRoute, upstreams: list[Upstream]) -> None:
        self.route = route
        self.upstreams = upstreams
        self._turn = 0

    def choose(self, without: frozenset[str] | set[str] = frozenset()) -> Upstream | None:
        """The replica with the fewest requests in flight (equals take turns), or None where there is none.

        Args:
            without: addresses that have just failed.

        Raises:
            ApiError: 429 `rate_limit_exceeded` when every replica is full.
        """
        candidates = [each for each in self.upstreams if each.address not in without]
        if not candidates:
            return None
        self._turn += 1
        turn = self._turn % len(candidates)
        best = min(candidates[turn:] + candidates[:turn], key=lambda each: each.in_flight)
        most = self.route.max_in_flight
        if most is not None and best.in_flight >= most:
            raise ApiError(
                429,
                f"'{self.route.id}' is busy: each of its {len(self.upstreams)} replicas has {most} requests "
                "in hand. Try again in a second.",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        return best


class Directory:
    """The route table as the gateway uses it: names to models, addresses to replicas with their counts."""

    def __init__(self, make_upstream: Callable[[str, str], Upstream]) -> None:
        self.version = -1
        self._make = make_upstream
        self._served: dict[str, Served] = {}
        self._names: dict[str, Served] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._changed = asyncio.Event()

    def replace(self, table: RouteTable) -> None:
        """Takes a new table. Replicas that stay keep connections and counts; those gone are let finish."""
        before = self._upstreams
        self._upstreams = {}
        self._served = {}
        for route in table.models:
            upstreams = []
            for replica in route.replicas:
                address = replica.socket or replica.url
                if address is None:
                    continue
                upstream = before.pop(address, None) or self._make(replica.id, address)
                upstream.id = replica.id
                self._upstreams[address] = upstream
                upstreams.append(upstream)
            self._served[route.id] = Served(route, upstreams)
        self._names = dict(self._served)
        for served in self._served.values():
            for alias in served.route.aliases:
                self._names.setdefault(alias, served)
        for gone in before.values():
            gone.retire()
        self.version = table.version
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, within_s: float) -> bool:
        """Waits for the next table; False when none came in time."""
        try:
            await asyncio.wait_for(self._changed.wait(), within_s)
        except TimeoutError:
            return False
        return True

    def find(self, name: str) -> Served:
        """The model of a name or alias.

        Raises:
            ApiError: 404 `model_not_found` with the nearest names.
        """
        served = self._names.get(name)
        if served is None:
            raise self._unknown(name)
        return served

    def _unknown(self, name: str) -> ApiError:
        shown = name if len(name) <= 100 else name[:100] + "…"
        if not self._names:
            hint = "No model is served yet."
        elif close := nearest(name[:200], self._names):
            hint = f"Did you mean {' or '.join(repr(each) for each in close)}?"
        else:
            hint = "GET /v1/models lists the names."
        return ApiError(
            404, f"There is no model '{shown}' here. {hint}", param="model", code="model_not_found"
        )

    @property
    def known(self) -> bool:
        """Whether it holds any model."""
        return bool(self._served)

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    async def close(self) -> None:
        """Closes every connection to a replica."""
        for upstream in self._upstreams.values():
            await upstream.close()
        self._upstreams = {}


def remaining_s(route: ModelRoute, now: float) -> float | None:
    """Roughly how long until the model is ready, seconds from `now` (Unix time); None when nobody knows."""
    if route.eta_s is None:
        return None
    return max(0.0, route.eta_s - max(0.0, now - route.at))


def first_line(reason: str) -> str:
    """A reason without what follows its first line: the rest belongs in the operator's log."""
    line = reason.strip().partition("\n")[0].strip().rstrip(".")
    return line if len(line) <= _MOST_REASON else line[:_MOST_REASON] + "…"


def not_ready(route: ModelRoute, now: float | None = None) -> ApiError:
    """The 503 for a model without a ready replica: which, in what state, why, and how long it still takes."""
    now = time.time() if now is None else now
    left = remaining_s(route, now)
    retry = UNKNOWN_RETRY_S if left is None else min(MOST_RETRY_S, max(LEAST_RETRY_S, math.ceil(left)))
    reason = first_line(route.reason)
    because = f" ({reason})" if reason else ""
    if left is None:
        outlook = "How long it takes is not known yet"
    elif left < LEAST_RETRY_S:
        outlook = "It should be ready any moment"
    else:
        outlook = f"It should be ready in about {_duration(left)}"
    return ApiError(
        503,
        f"Model '{route.id}' is not ready: it is {_WORDS[route.state]}{because}. {outlook}; "
        f"try again in {retry} s.",
        param="model",
        code="model_not_ready",
        headers={"retry-after": str(retry)},
        extra={"loading": {"state": route.state, "reason": reason, "expected_s": left}},
    )


def _duration(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 100 else f"{math.ceil(whole / 60)} min"
