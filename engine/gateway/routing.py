"""Which model a name means, and which of its replicas takes the next request."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet

from engine.errors import ApiError, nearest
from engine.gateway.upstream import Upstream
from engine.metering.tenants import Tenant
from engine.routes import DedicatedRoute, ModelRoute, RouteTable

#: States in which a model is not on its way to being ready.
_AT_REST = frozenset({"ready", "asleep", "draining", "stopped"})
#: The pool of the replicas that nobody owns.
SHARED = ""
#: What a tenant's id looks like.
_ID = re.compile(r"tenant_[0-9a-f]{12}")


class Served:
    """One model of the table with its replicas, in pools: the shared one and one for each owner.

    A request waits and is served in one pool. The pool of a tenant without replicas of its own is the shared
    one, which never holds an owned replica.
    """

    __slots__ = ("_pools", "_routes", "_spills", "_turn", "route", "upstreams")

    def __init__(self, route: ModelRoute, upstreams: list[Upstream]) -> None:
        self.route = route
        #: All of them, owned ones too.
        self.upstreams = upstreams
        self._turn = 0
        self._routes = {each.owner: _view(route, each) for each in route.dedicated}
        self._spills = frozenset(each.owner for each in route.dedicated if each.spill_over)
        self._pools: dict[str, list[Upstream]] = {SHARED: [], **{owner: [] for owner in self._routes}}
        for each in upstreams:
            # A replica whose owner has no row is nobody's: it must not become everybody's.
            self._pools.setdefault(each.owner or SHARED, []).append(each)

    def owner(self, tenant: Tenant | None) -> str:
        """The name under which the tenant owns replicas of this model; "" where it does not."""
        if tenant is None or not self._routes:
            return SHARED
        if tenant.id in self._routes:
            return tenant.id
        # What looks like an id is never taken for a name: nobody reaches another's replicas by being
        # called like its id.
        return tenant.name if tenant.name in self._routes and not _ID.fullmatch(tenant.name) else SHARED

    def is_open(self, tenant: Tenant | None) -> bool:
        """Whether the tenant is served at all: the model is shared, or it owns replicas of it."""
        return self.route.shared or bool(self.owner(tenant))

    def check_open(self, tenant: Tenant | None) -> None:
        """Holds models with owned replicas only to their owners.

        Raises:
            ApiError: 403 `model_not_allowed`.
        """
        if not self.is_open(tenant):
            raise ApiError(
                403,
                f"'{self.route.id}' is served to its owner alone; this key is not one of its owner's. "
                "GET /v1/models lists the models.",
                param="model",
                code="model_not_allowed",
            )

    def pool(
        self, tenant: Tenant | None, without: AbstractSet[str] = frozenset(), *, window: int | None = None
    ) -> str:
        """Where a request of this tenant waits and is served now: "" (the shared pool) or the owner's name.

        With spill-over an owner's requests go to the shared pool while none of its own replicas is ready
        or all are full, and the shared ones have room; or, if none of its own is ready, are to be waited
        for.

        Args:
            tenant: the caller's; None where no keys are asked for.
            without: addresses that have just failed.
            window: requests of this worker at one replica at which it counts as full; None = what a
                replica works on together (`max_batch`).
        """
        owner = self.owner(tenant)
        if not owner or owner not in self._spills:
            return owner
        own = [each for each in self._pools[owner] if each.address not in without]
        if any(self._has_room(each, window) for each in own):
            return owner
        shared = [each for each in self._pools[SHARED] if each.address not in without]
        if any(self._has_room(each, window) for each in shared):
            return SHARED
        if own or not self.route.shared:
            return owner
        return SHARED if shared or self.route.wake_wait_s is not None else owner

    @property
    def pools(self) -> Iterator[str]:
        """The shared pool, where the model has one, and the owners'."""
        return (pool for pool in self._pools if pool or self.route.shared)

    def replicas(self, pool: str) -> list[Upstream]:
        """The ready replicas of a pool."""
        return self._pools.get(pool, [])

    def route_of(self, pool: str) -> ModelRoute:
        """The row as it is true of a pool: its state, reason and time left; an owned one is never asleep."""
        return self._routes.get(pool, self.route)

    def choose(
        self, without: AbstractSet[str] = frozenset(), *, tenant: Tenant | None = None
    ) -> Upstream | None:
        """The replica of the tenant's pool that takes a request now: `choose_in(pool(tenant))`.

        Raises:
            ApiError: 429 `rate_limit_exceeded` when every replica is full; 403 `model_not_allowed` when only
                other tenants are served.
        """
        self.check_open(tenant)
        return self.choose_in(self.pool(tenant, without), without)

    def choose_in(self, pool: str, without: AbstractSet[str] = frozenset()) -> Upstream | None:
        """The replica of a pool with the fewest requests in flight (equals take turns), None without any.

        Args:
            pool: as `pool` names it.
            without: addresses that have just failed.

        Raises:
            ApiError: 429 `rate_limit_exceeded` when every replica is full.
        """
        replicas = self.replicas(pool)
        candidates = [each for each in replicas if each.address not in without] if without else replicas
        if not candidates:
            return None
        self._turn += 1
        turn = self._turn % len(candidates)
        best = min(candidates[turn:] + candidates[:turn], key=lambda each: each.in_flight)
        most = self.route.max_in_flight
        if most is not None and best.in_flight >= most:
            each_of = f"the {len(replicas)} replicas of '{pool}'" if pool else f"its {len(replicas)} replicas"
            raise ApiError(
                429,
                f"'{self.route.id}' is busy: each of {each_of} has {most} requests in hand. Try again in a "
                "second.",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        return best

    def _has_room(self, upstream: Upstream, window: int | None) -> bool:
        most = window or self.route.max_batch or self.route.max_in_flight
        return most is None or upstream.in_flight < most


def _view(route: ModelRoute, own: DedicatedRoute) -> ModelRoute:
    return route.model_copy(
        update={
            "owner": own.owner,
            "tier": "resident",
            "wake_wait_s": None,
            "state": own.state,
            "reason": own.reason,
            "eta_s": own.eta_s,
        }
    )


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
        #: Since when a model's pool has been on its way, on the monotonic clock.
        self._since: dict[tuple[str, str], float] = {}
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
                upstream.id, upstream.owner = replica.id, replica.owner
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
            (id, pool): self._since.get((id, pool), now)
            for id, served in self._served.items()
            for pool in served.pools
            if not served.replicas(pool) and served.route_of(pool).state not in _AT_REST
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

    def elapsed_s(self, model: str, pool: str = SHARED) -> float | None:
        """How long this worker has seen a pool of the model on its way, seconds; None when it is not.

        It is on its way from the first table in which it had no ready replica and was neither asleep nor
        about to be, until the next in which it has.
        """
        since = self._since.get((model, pool))
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
