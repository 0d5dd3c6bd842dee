"""Owned replicas behind a gateway: lines of their own, spill-over, models that are one tenant's alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from engine.metering import keys, tenants
from engine.metering.opening import opened
from engine.routes import DedicatedRoute, ModelRoute, Replica
from tests.gateway.dummy import DummyRunner, House, open_house, route, until
from tests.gateway.test_fair import CHAT, gate_of, nothing_left, send, texts

OWNER = "hearth-test-key-of-the-owner-0123456789"


def owned(shared: DummyRunner, own: DummyRunner | None, *, spill: bool = False, **more: Any) -> ModelRoute:
    """A model with one shared replica and one of acme's; None = that one is dead."""
    row = route("dummy", shared, max_batch=1, **more)
    state: dict[str, Any] = (
        {"state": "ready"} if own else {"state": "backoff", "reason": "killed", "eta_s": 4}
    )
    row.dedicated = [DedicatedRoute(owner="acme", spill_over=spill, **state)]
    if own is not None:
        row.replicas.append(Replica(id="dummy@acme-0", socket=str(own.path), owner="acme"))
    return row


@pytest.fixture
async def shared(runner: DummyRunner) -> DummyRunner:
    return runner


@pytest.fixture
async def own(second: DummyRunner) -> DummyRunner:
    second.behaviour = "slow"
    return second


@contextlib.asynccontextmanager
async def house_of(folder: Path, *runners: DummyRunner, row: ModelRoute) -> AsyncIterator[House]:
    async with opened(Config(state_dir=folder)) as database:
        await tenants.create(database, "acme")
        await keys.create(database, key=OWNER, name="owner", tenant="acme")
    async with open_house(folder, row) as house:
        yield house
        for each in runners:
            each.go_on.set()
        await until(lambda: nothing_left(gate_of(house)))


async def test_an_owner_waits_in_a_line_of_its_own(
    tmp_path: Path, shared: DummyRunner, own: DummyRunner
) -> None:
    async with house_of(tmp_path, shared, own, row=owned(shared, own)) as house:
        first = send(house, "first", key=OWNER)
        await own.arrived.wait()
        second = send(house, "second", key=OWNER)
        for count in range(3):
            status, _, _ = await send(house, f"other {count}")
            assert status == 200, "nobody else notices"
        assert texts(own) == ["first"] and not second.done()
        assert gate_of(house).waiting("dummy") == 0, "nobody waits for the shared ones"
        own.go_on.set()
        assert [(await each)[0] for each in (first, second)] == [200, 200]
        assert texts(own) == ["first", "second"]
        assert texts(shared) == ["other 0", "other 1", "other 2"]


async def test_who_waits_for_an_owned_replica_that_dies_is_told_so(
    tmp_path: Path, shared: DummyRunner, own: DummyRunner
) -> None:
    async with house_of(tmp_path, shared, own, row=owned(shared, own)) as house:
        first = send(house, "first", key=OWNER)
        await own.arrived.wait()
        second = send(house, "second", key=OWNER)
        await until(lambda: not nothing_left(gate_of(house)))
        house.serve(owned(shared, None))
        status, body, headers = await second
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "model_not_ready", "4")
        assert "the replica dedicated to 'acme' is failed" in body["error"]["message"]
        assert texts(shared) == []
        own.go_on.set()
        assert (await first)[0] == 200


async def test_with_spill_over_a_full_one_sends_on_and_a_dead_one_too(
    tmp_path: Path, shared: DummyRunner, own: DummyRunner
) -> None:
    async with house_of(tmp_path, shared, own, row=owned(shared, own, spill=True)) as house:
        first = send(house, "first", key=OWNER)
        await own.arrived.wait()
        assert (await send(house, "second", key=OWNER))[0] == 200
        house.serve(owned(shared, None, spill=True))
        assert (await send(house, "third", key=OWNER))[0] == 200
        assert texts(shared) == ["second", "third"]
        own.go_on.set()
        assert (await first)[0] == 200 and texts(own) == ["first"]


async def test_with_spill_over_it_waits_for_its_own_where_all_are_full(
    tmp_path: Path, shared: DummyRunner, own: DummyRunner
) -> None:
    shared.behaviour = "slow"
    async with house_of(tmp_path, shared, own, row=owned(shared, own, spill=True)) as house:
        others = send(house, "other")
        await shared.arrived.wait()
        first = send(house, "first", key=OWNER)
        await own.arrived.wait()
        second = send(house, "second", key=OWNER)
        own.go_on.set()
        assert [(await each)[0] for each in (first, second)] == [200, 200]
        assert texts(own) == ["first", "second"] and texts(shared) == ["other"]
        shared.go_on.set()
        assert (await others)[0] == 200


async def test_a_lost_connection_spills_over_at_once(
    tmp_path: Path, shared: DummyRunner, own: DummyRunner
) -> None:
    async with house_of(tmp_path, shared, own, row=owned(shared, own, spill=True)) as house:
        await own.stop()
        assert (await send(house, "first", key=OWNER))[0] == 200
        assert texts(shared) == ["first"]


async def test_without_spill_over_a_lost_connection_does_not(
    tmp_path: Path, shared: DummyRunner, own: DummyRunner
) -> None:
    async with house_of(tmp_path, shared, own, row=owned(shared, own)) as house:
        await own.stop()
        status, body, headers = await send(house, "first", key=OWNER)
        assert status == 503 and body["error"]["code"] == "model_not_ready" and "retry-after" in headers
        assert (await send(house, "other"))[0] == 200
        assert texts(shared) == ["other"]


async def test_a_model_of_one_tenant_is_closed_and_hidden_to_others(
    tmp_path: Path, shared: DummyRunner, own: DummyRunner
) -> None:
    own.go_on.set()
    alone = owned(shared, own).model_copy(update={"shared": False, "id": "private"})
    alone.replicas = alone.replicas[1:]
    async with house_of(tmp_path, shared, own, row=route("dummy", shared)) as house:
        house.serve(route("dummy", shared), alone)
        status, body, _ = await house.post(CHAT, {"model": "private", "messages": []})
        assert (status, body["error"]["code"]) == (403, "model_not_allowed")
        assert "acme" not in json.dumps(body)
        _, listed, _ = await house.get("/v1/models")
        assert [each["id"] for each in json.loads(listed)["data"]] == ["dummy"]
        assert (await house.get("/v1/models/private"))[0] == 404
        mine = {"authorization": f"Bearer {OWNER}"}
        assert (await house.post(CHAT, {"model": "private", "messages": []}, headers=mine))[0] == 200
        _, listed, _ = await house.get("/v1/models", **mine)
        assert [each["id"] for each in json.loads(listed)["data"]] == ["dummy", "private"]
        assert len(own.seen) == 1 and shared.seen == []
