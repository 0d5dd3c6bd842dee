"""Which model a name means, and which of its replicas takes the next request."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator

from engine.errors import ApiError, nearest
from engine.gateway.upstream import Upstream
from engine.routes import ModelRoute, RouteTable

#: States in which a model is not on its way to being ready.
_AT_REST = frozenset({"ready", "asleep", "draining", "stopped"})


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
        #: Replicas out of the table that still have requests in hand, by address.
        self._leaving: dict[str, Upstream] = {}
        #: Since when a model has been on its way, on the monotonic clock.
        self._since: dict[str, float] = {}
        self._changed = asyncio.Event()
        #: Called after every new table, and when a replica out of the table has answered its last request.
        self.listeners: list[Callable[[], None]] = []

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
                upstream = before.pop(address, None) or self._back(address) or self._make(replica.id, address)
                upstream.id = replica.id
                self._upstreams[address] = upstream
                upstreams.append(upstream)
            self._served[route.id] = Served(route, upstreams)
        self._names = dict(self._served)
        for served in self._served.values():
            for alias in served.route.aliases:
                self._names.setdefault(alias, served)
        for gone in before.values():
            if gone.in_flight:
                self._leaving[gone.address] = gone
            gone.retire(self._gone)
        now = time.monotonic()
        self._since = {
            id: self._since.get(id, now)
            for id, served in self._served.items()
            if not served.upstreams and served.route.state not in _AT_REST
        }
        self.version = table.version
        self._changed.set()
        self._changed = asyncio.Event()
        self._tell()

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

    def elapsed_s(self, model: str) -> float | None:
        """How long this worker has seen the model on its way, seconds; None when it is not.

        It is on its way from the first table in which it had no ready replica and was neither asleep nor
        about to be, until the next in which it has.
        """
        since = self._since.get(model)
        return None if since is None else time.monotonic() - since

    def upstreams(self) -> Iterator[Upstream]:
        """Every replica of the table, and those out of it that still have requests in hand."""
        return itertools.chain(self._upstreams.values(), self._leaving.values())

    @property
    def known(self) -> bool:
        """Whether it holds any model."""
        return bool(self._served)

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    async def close(self) -> None:
        """Closes every connection to a replica."""
        for upstream in list(self.upstreams()):
            await upstream.close()
        self._upstreams, self._leaving = {}, {}

    def _back(self, address: str) -> Upstream | None:
        """A replica that was leaving and is in the table again, with its count."""
        upstream = self._leaving.pop(address, None)
        if upstream is not None:
            upstream.restore()
        return upstream

    def _gone(self, upstream: Upstream) -> None:
        self._leaving.pop(upstream.address, None)
        self._tell()

    def _tell(self) -> None:
        for listener in self.listeners:
            listener()
