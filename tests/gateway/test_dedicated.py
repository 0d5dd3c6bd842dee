"""Replicas that tenants own: whose requests go where. Pure, but for the last ones through a gateway."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ApiError
from engine.gateway.loading import not_ready
from engine.gateway.pages import card, may_see, readiness
from engine.gateway.routing import SHARED, Directory, Served
from engine.gateway.upstream import Upstream
from engine.metering.tenants import Tenant
from engine.routes import DedicatedRoute, ModelRoute, Replica, RouteTable

ACME = Tenant(id="tenant_0123456789ab", name="acme", created_at=0)
OTHER = Tenant(id="tenant_ba9876543210", name="other", created_at=0)


def row(
    shared: int = 1, owned: int = 1, *, spill: bool = False, owner: str = "acme", **fields: Any
) -> ModelRoute:
    """A model 'm' with so many ready replicas of each kind, at addresses that say which."""
    replicas = [Replica(id=f"m-{i}", url=f"http://shared{i}:1") for i in range(shared)]
    replicas += [Replica(id=f"m@{owner}-{i}", url=f"http://owned{i}:1", owner=owner) for i in range(owned)]
    own = DedicatedRoute(
        owner=owner,
        spill_over=spill,
        state="ready" if owned else "backoff",
        reason="" if owned else "its process was killed by SIGKILL",
        eta_s=0.0 if owned else 7.0,
    )
    given: dict[str, Any] = {
        "state": "ready", "max_batch": 4, "dedicated": [own], "at": 1000.0, "replicas": replicas
    }  # fmt: skip
    return ModelRoute(id="m", category="chat", **(given | fields))


def served(route: ModelRoute) -> Served:
    return directory(route).find("m")


def directory(route: ModelRoute) -> Directory:
    known = Directory(lambda id, address: Upstream(id, address, connect_timeout_s=1))
    known.replace(RouteTable(version=1, models=[route]))
    return known


def chosen(model: Served, tenant: Tenant | None, times: int = 8) -> set[str]:
    return {each.id for _ in range(times) if (each := model.choose(tenant=tenant))}


def test_an_owners_requests_go_to_its_own_replicas_and_nobody_elses_do() -> None:
    model = served(row(2, 2))
    assert chosen(model, ACME) == {"m@acme-0", "m@acme-1"}
    assert chosen(model, OTHER) == chosen(model, None) == {"m-0", "m-1"}
    assert (model.pool(ACME), model.pool(OTHER), model.pool(None)) == ("acme", SHARED, SHARED)
    assert [each.id for each in model.replicas("acme")] == ["m@acme-0", "m@acme-1"]
    assert [each.id for each in model.replicas(SHARED)] == ["m-0", "m-1"]


def test_among_its_own_the_least_loaded_takes_it() -> None:
    model = served(row(1, 2))
    model.replicas("acme")[0].in_flight = 2
    assert chosen(model, ACME) == {"m@acme-1"}


def test_an_owner_is_known_by_name_or_id_and_nobody_by_being_called_like_an_id() -> None:
    by_id = served(row(owner=ACME.id))
    thief = Tenant(id="tenant_000000000000", name=ACME.id, created_at=0)
    assert by_id.pool(ACME) == ACME.id
    assert by_id.pool(thief) == SHARED and chosen(by_id, thief) == {"m-0"}


def test_without_spill_over_nothing_makes_it_share() -> None:
    model = served(row(1, 1))
    (own,) = model.replicas("acme")
    own.in_flight = 1000
    assert chosen(model, ACME) == {"m@acme-0"}
    assert model.choose({own.address}, tenant=ACME) is None
    gone = served(row(1, 0))
    assert gone.pool(ACME) == "acme" and gone.choose(tenant=ACME) is None
    assert chosen(gone, OTHER) == {"m-0"}


def test_the_full_and_the_dead_shared_ones_leave_the_owned_alone() -> None:
    full = served(row(1, 1, max_in_flight=2))
    full.replicas(SHARED)[0].in_flight = 2
    with pytest.raises(ApiError, match="each of its 1 replicas has 2") as refused:
        full.choose(tenant=OTHER)
    assert refused.value.status == 429
    assert chosen(full, ACME) == {"m@acme-0"}
    dead = served(row(0, 1, state="backoff"))
    assert dead.choose(tenant=OTHER) is None and dead.choose() is None
    assert chosen(dead, ACME) == {"m@acme-0"}


def test_an_owner_whose_own_are_full_is_told_of_its_own() -> None:
    model = served(row(1, 1, max_in_flight=2))
    model.replicas("acme")[0].in_flight = 2
    with pytest.raises(ApiError, match="each of the 1 replicas of 'acme' has 2"):
        model.choose(tenant=ACME)


def test_spill_over_while_its_own_are_full_failing_or_not_ready() -> None:
    model = served(row(1, 1, spill=True))
    (own,) = model.replicas("acme")
    assert chosen(model, ACME) == {"m@acme-0"}
    own.in_flight = 4  # as many as it works on together
    assert model.pool(ACME) == SHARED and chosen(model, ACME) == {"m-0"}
    assert model.pool(ACME, window=5) == "acme"
    own.in_flight = 0
    assert model.choose({own.address}, tenant=ACME) is model.replicas(SHARED)[0]
    gone = served(row(1, 0, spill=True))
    assert chosen(gone, ACME) == {"m-0"}
    assert chosen(model, OTHER) == {"m-0"}, "it goes one way only"


def test_where_the_shared_ones_are_full_too_it_waits_for_its_own() -> None:
    model = served(row(1, 1, spill=True))
    for each in model.upstreams:
        each.in_flight = 4
    assert model.pool(ACME) == "acme"


def test_spill_over_wakes_shared_ones_that_sleep_only_when_its_own_are_gone() -> None:
    asleep: dict[str, Any] = {"state": "asleep", "tier": "standby", "wake_wait_s": 60.0}
    assert served(row(0, 0, spill=True, **asleep)).pool(ACME) == SHARED
    busy = served(row(0, 1, spill=True, **asleep))
    busy.replicas("acme")[0].in_flight = 4
    assert busy.pool(ACME) == "acme"


def test_with_nothing_ready_anywhere_an_owner_hears_of_its_own() -> None:
    model = served(row(0, 0, spill=True, state="failed"))
    assert model.pool(ACME) == "acme"


def test_not_ready_tells_the_state_of_the_owners_replica() -> None:
    model = served(row(1, 0))
    error = not_ready(model.route_of(model.pool(ACME)), 1000.0)
    assert (error.status, error.code) == (503, "model_not_ready")
    assert "the replica dedicated to 'acme' is failed and waiting to be started again" in error.message
    assert "SIGKILL" in error.message and error.headers["retry-after"] == "7"
    assert error.extra["loading"]["state"] == "backoff"
    asleep = served(row(0, 0, state="asleep", tier="standby", wake_wait_s=60.0))
    view = asleep.route_of("acme")
    assert (view.tier, view.wake_wait_s) == ("resident", None), "nobody waits for an owned one to wake"
    assert asleep.route_of(SHARED).state == "asleep"


def test_how_long_a_pool_is_on_its_way_is_its_own() -> None:
    known = directory(row(1, 0))
    assert known.elapsed_s("m") is None and known.elapsed_s("m", "acme") is not None
    known = directory(row(0, 1, state="starting"))
    assert known.elapsed_s("m") is not None and known.elapsed_s("m", "acme") is None


def test_a_model_of_one_tenant_alone_is_closed_to_others() -> None:
    model = served(row(0, 1).model_copy(update={"shared": False}))
    assert chosen(model, ACME) == {"m@acme-0"}
    for tenant in (OTHER, None):
        with pytest.raises(ApiError) as refused:
            model.choose(tenant=tenant)
        assert (refused.value.status, refused.value.code) == (403, "model_not_allowed")
        assert "acme" not in refused.value.message
    assert not may_see(None, model)
    assert list(model.pools) == ["acme"]


def test_a_replica_without_an_owners_row_is_nobodys() -> None:
    model = served(row(1, 1, dedicated=[]))
    assert chosen(model, ACME) == chosen(model, OTHER) == {"m-0"}


def test_a_replica_that_gets_an_owner_is_shared_no_longer() -> None:
    known = directory(row(2, 1))
    replicas = [Replica(id="m-0", url="http://shared0:1", owner="acme")]
    replicas.append(Replica(id="m-1", url="http://shared1:1"))
    known.replace(RouteTable(version=2, models=[row(0, 0, spill=False, replicas=replicas)]))
    model = known.find("m")
    assert chosen(model, ACME) == {"m-0"} and chosen(model, OTHER) == {"m-1"}


def test_readiness_counts_owned_replicas_too_and_a_card_is_its_callers() -> None:
    known = directory(row(1, 0))
    with pytest.raises(ApiError) as refused:
        readiness(known, 1000.0)
    assert "1 of 1 models are not ready: m (backoff, dedicated)" in refused.value.message
    model = known.find("m")
    shared, own = card(model, 1000.0, None), card(model, 1000.0, 3.0, "acme")
    assert (shared.state, shared.loading) == ("ready", None)
    assert own.state == "backoff" and own.loading and own.loading.elapsed_s == 3.0


@given(
    shared=st.integers(0, 3),
    owned=st.integers(0, 3),
    spill=st.booleans(),
    loads=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    lost=st.sets(st.integers(0, 5)),
    most=st.sampled_from([None, 5]),
    asleep=st.booleans(),
)
def test_no_load_or_loss_ever_mixes_them(
    shared: int, owned: int, spill: bool, loads: list[int], lost: set[int], most: int | None, asleep: bool
) -> None:
    tier: dict[str, Any] = {"state": "asleep", "tier": "standby", "wake_wait_s": 9.0} if asleep else {}
    model = served(row(shared, owned, spill=spill, max_in_flight=most, **tier))
    for each, load in zip(model.upstreams, loads, strict=False):
        each.in_flight = load
    without = {each.address for number, each in enumerate(model.upstreams) if number in lost}

    def choose(tenant: Tenant | None) -> Upstream | None:
        try:
            return model.choose(without, tenant=tenant)
        except ApiError as full:
            assert full.status == 429
            return None

    for stranger in (OTHER, None):
        upstream = choose(stranger)
        assert upstream is None or upstream.owner is None
    upstream = choose(ACME)
    assert upstream is None or upstream.address not in without
    if not spill:
        assert upstream is None or upstream.owner == "acme"
    own = [each for each in model.replicas("acme") if each.address not in without and each.in_flight < 4]
    if own:
        assert upstream is not None and upstream.owner == "acme", "while it has room it keeps to its own"
