"""What a worker reports: the table it follows, what is in flight (also out of that table), who waits."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.gateway import usage
from engine.gateway.firstbytes import FirstBytes
from engine.gateway.routing import Directory, Served
from engine.gateway.upstream import Upstream
from engine.routes import ModelRoute, Replica, RouteTable
from tests.gateway.dummy import DummyRunner, House, open_house, route, until
from tests.gateway.scheduler import FakeScheduler

CHAT = "/v1/chat/completions"
ASK = {"model": "dummy", "messages": [{"role": "user", "content": "hello"}]}


def asleep(**more: Any) -> ModelRoute:
    return route("dummy", **{"state": "asleep", "tier": "standby", "wake_wait_s": 5.0, **more})


def in_flight(report: dict[str, Any], replica: str = "dummy-0") -> int:
    """What a report says of a replica; nothing said is nothing there."""
    found = report["replicas"].get(replica)
    return found["in_flight"] if found is not None else 0


async def reported(scheduler: FakeScheduler, true: Any, within_s: float = 3.0) -> dict[str, Any]:
    """The first report from now on of which `true` holds."""
    seen = len(scheduler.usage)
    await until(lambda: any(true(report) for report in scheduler.usage[seen:]), within_s)
    return next(report for report in scheduler.usage[seen:] if true(report))


@pytest.fixture
def by_occasion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports come at once or, within a test, not at all."""
    monkeypatch.setattr(usage, "LOOK_S", 60.0)
    monkeypatch.setattr(usage, "REPORT_S", 600.0)


@pytest.mark.usefixtures("by_occasion")
async def test_a_new_table_is_acknowledged_at_once(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    scheduler.table = RouteTable(version=5, models=[route("dummy", runner)])
    async with open_house(tmp_path):
        await until(lambda: scheduler.usage)
        first = scheduler.usage[0]
        assert (first["worker"], first["version"]) == (os.getpid(), 5)
        assert in_flight(first) == 0 and 0 <= first["replicas"]["dummy-0"]["idle_s"] < 3
        assert first["models"] == {"dummy": {"waiting": 0, "first_byte_s": None}}
        for version in (6, 7, 8):
            scheduler.publish(RouteTable(version=version, models=[asleep()]))
            report = await reported(scheduler, lambda each, version=version: each["version"] == version)
            assert report["replicas"] == {}


@pytest.mark.usefixtures("by_occasion")
async def test_a_replica_that_left_the_table_is_counted_until_its_requests_end(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    runner.behaviour = "slow"
    scheduler.table = RouteTable(version=1, models=[route("dummy", runner)])
    async with open_house(tmp_path) as house:
        await until(lambda: scheduler.usage)
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await asyncio.wait_for(runner.arrived.wait(), 2)
        scheduler.publish(RouteTable(version=2, models=[asleep(state="draining")]))
        report = await reported(scheduler, lambda each: each["version"] == 2)
        assert in_flight(report) == 1
        seen = len(scheduler.usage)
        runner.go_on.set()
        assert (await asking)[0] == 200
        # The end of its last request is told at once too.
        await until(lambda: any(in_flight(each) == 0 for each in scheduler.usage[seen:]))


async def test_a_replica_that_comes_back_keeps_its_count(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "LOOK_S", 0.02)
    runner.behaviour = "slow"
    scheduler.table = RouteTable(version=1, models=[route("dummy", runner)])
    async with open_house(tmp_path) as house:
        await until(lambda: scheduler.usage)
        first = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: len(runner.seen) == 1)
        scheduler.publish(RouteTable(version=2, models=[asleep(state="draining")]))
        await reported(scheduler, lambda each: each["version"] == 2)
        scheduler.publish(RouteTable(version=3, models=[route("dummy", runner)]))
        report = await reported(scheduler, lambda each: each["version"] == 3)
        assert in_flight(report) == 1
        seen = len(scheduler.usage)
        second = asyncio.create_task(house.post(CHAT, ASK))
        await until(lambda: any(in_flight(each) == 2 for each in scheduler.usage[seen:]))
        runner.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(first, second)] == [200, 200]
        await until(lambda: in_flight(scheduler.usage[-1]) == 0)


async def test_no_change_is_told_rarely_and_a_change_soon(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "LOOK_S", 0.02)
    monkeypatch.setattr(usage, "REPORT_S", 0.5)
    scheduler.table = RouteTable(version=1, models=[route("dummy", runner)])
    async with open_house(tmp_path) as house:
        await until(lambda: scheduler.usage)
        told = len(scheduler.usage)
        await asyncio.sleep(0.2)
        assert len(scheduler.usage) == told
        # A request that came and went between two looks is news: it was the replica's last use.
        for _ in range(3):
            await house.post(CHAT, ASK)
        await until(lambda: len(scheduler.usage) > told)
        assert scheduler.usage[told]["replicas"]["dummy-0"]["idle_s"] < 0.2
        # Many changes are few reports.
        told, began = len(scheduler.usage), time.monotonic()
        while time.monotonic() - began < 0.2:
            await house.post(CHAT, ASK)
        assert 2 <= len(scheduler.usage) - told <= (time.monotonic() - began) / 0.02 + 1
        await reported(scheduler, lambda each: each["replicas"]["dummy-0"]["idle_s"] > 0.4)


async def test_who_waits_and_how_long_first_bytes_take(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "LOOK_S", 0.02)
    runner.behaviour = "stream"
    async with open_house(tmp_path, asleep()) as house:
        asking = asyncio.create_task(house.post(CHAT, ASK))
        await reported(scheduler, lambda each: each["models"]["dummy"]["waiting"] == 1)
        await asyncio.sleep(0.3)
        house.serve(route("dummy", runner))
        report = await reported(scheduler, lambda each: each["models"]["dummy"]["first_byte_s"] is not None)
        assert report["models"]["dummy"]["waiting"] == 0
        # The wait for the model is no wait for the runner; and the stream need not have ended.
        assert 0 < report["models"]["dummy"]["first_byte_s"] < 0.3
        assert in_flight(report) == 1
        asking.cancel()
        await reported(scheduler, lambda each: in_flight(each) == 0)


async def test_a_scheduler_that_is_away_is_no_matter(
    tmp_path: Path,
    runner: DummyRunner,
    scheduler: FakeScheduler,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(usage, "LOOK_S", 0.02)
    caplog.set_level(logging.INFO)
    await scheduler.stop()
    async with open_house(tmp_path, route("dummy", runner)) as house:
        assert (await house.post(CHAT, ASK))[0] == 200
        # One that answers with an error is as good as away.
        scheduler.usage_status = 500
        await scheduler.start()
        await until(lambda: scheduler.usage)
        scheduler.usage_status = 200
        version = house.gateway.directory.version
        report = await reported(scheduler, lambda each: each["version"] == version)
        assert report["replicas"]["dummy-0"]["in_flight"] == 0
    assert "usage" not in caplog.text


async def test_an_empty_table_is_acknowledged_too(tmp_path: Path, scheduler: FakeScheduler) -> None:
    async with open_house(tmp_path) as house:
        await until(lambda: scheduler.usage)
        assert scheduler.usage[0]["version"] == 0
        assert scheduler.usage[0]["replicas"] == scheduler.usage[0]["models"] == {}
        assert house.gateway.directory.version == 0


async def test_nothing_comes_after_an_acknowledgement(
    tmp_path: Path, runner: DummyRunner, scheduler: FakeScheduler
) -> None:
    """The promise by which a model is put to sleep under load: acknowledged and none in flight is none."""
    chance = random.Random(11)
    version = 0

    def publish(row: ModelRoute) -> int:
        nonlocal version
        version += 1
        scheduler.publish(RouteTable(version=version, models=[row]))
        return version

    runner.behaviour = "brief"
    publish(route("dummy", runner, tier="standby", wake_wait_s=5.0))
    async with open_house(tmp_path) as house:
        await until(lambda: scheduler.usage)
        stop = False

        async def client() -> list[int]:
            statuses = []
            while not stop:
                statuses.append((await house.post(CHAT, ASK))[0])
                await asyncio.sleep(chance.random() * 0.004)
            return statuses

        clients = [asyncio.create_task(client()) for _ in range(12)]
        for _ in range(25):
            seen = len(runner.seen)
            await until(lambda seen=seen: len(runner.seen) > seen + 10)
            left = publish(asleep(state="draining"))
            await until(
                lambda left=left: any(
                    report["version"] == left and in_flight(report) == 0 for report in scheduler.usage
                )
            )
            runner.behaviour = "asleep"
            await asyncio.sleep(chance.random() * 0.01)
            runner.behaviour = "brief"
            publish(route("dummy", runner, tier="standby", wake_wait_s=5.0))
        stop = True
        statuses = [status for each in await asyncio.gather(*clients) for status in each]
    assert runner.asleep == 0
    assert len(statuses) > 250 and set(statuses) == {200}


async def test_between_choosing_a_replica_and_counting_there_is_no_turn_of_the_loop(
    house: House, runner: DummyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    choose = Served.choose_in

    def withdraw() -> None:
        house.serve(asleep(state="draining"))
        reports.append(house.gateway._usage.report())

    def choose_and_withdraw(served: Served, pool: str, without: set[str]) -> Upstream | None:
        asyncio.get_running_loop().call_soon(withdraw)
        return choose(served, pool, without)

    monkeypatch.setattr(Served, "choose_in", choose_and_withdraw)
    assert (await house.post(CHAT, ASK))[0] == 200
    assert [in_flight(report) for report in reports] == [1]
    assert in_flight(house.gateway._usage.report()) == 0


async def test_a_request_chooses_from_the_table_in_force(
    house: House, runner: DummyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read under an older table, and its pictures took until after the acknowledgement."""
    fetched = asyncio.Event()

    async def settle(body: bytes, endpoint: str) -> bytes:
        fetched.set()
        house.serve(route("eyes", category="detection", state="draining"))
        return body

    house.serve(route("eyes", runner, category="detection"))
    monkeypatch.setattr(house.gateway._pictures, "settle", settle)
    status, body, _ = await house.post("/v1/detections", {"model": "eyes", "image": "https://x.example/"})
    assert (status, body["error"]["code"]) == (503, "model_not_ready")
    assert fetched.is_set() and runner.seen == []


@given(st.lists(st.sampled_from(["in", "out", "take", "done"]), max_size=40))
def test_every_request_is_counted_whatever_the_table_does(steps: list[str]) -> None:
    directory = Directory(lambda id, address: Upstream(id, address, connect_timeout_s=1))
    told = []
    directory.listeners.append(lambda: told.append(None))
    taken: list[Upstream] = []
    replica = Replica(id="r", socket="/r")
    for step in steps:
        before = len(told)
        if step in ("in", "out"):
            row = ModelRoute(id="a", category="chat", replicas=[replica] if step == "in" else [])
            directory.replace(RouteTable(version=directory.version + 1, models=[row]))
            assert len(told) == before + 1
        elif step == "take" and directory.known and (upstream := directory.find("a").choose()) is not None:
            upstream.taken()
            taken.append(upstream)
        elif step == "done" and taken:
            last_of_gone = len(taken) == 1 and not directory.find("a").upstreams
            taken.pop(0).done()
            assert len(told) == before + last_of_gone
        counted = {id(each): each for each in directory.upstreams()}
        assert sum(each.in_flight for each in counted.values()) == len(taken)
        assert all(each.in_flight or each in directory.find("a").upstreams for each in counted.values())


def test_the_mean_wait_is_that_of_the_last_seconds() -> None:
    now = 100.0
    bytes_ = FirstBytes(clock=lambda: now)
    assert bytes_.mean("a") is None
    bytes_.add("a", 1.0)
    bytes_.add("a", 3.0)
    bytes_.add("b", 9.0)
    assert (bytes_.mean("a"), bytes_.mean("b")) == (2.0, 9.0)
    now = 105.0
    bytes_.add("a", 5.0)
    assert bytes_.mean("a") == 3.0
    now = 110.0
    assert (bytes_.mean("a"), bytes_.mean("b")) == (5.0, None)
    now = 115.0
    assert bytes_.mean("a") is None
    now = 1000.0
    bytes_.add("a", 7.0)
    assert bytes_.mean("a") == 7.0
