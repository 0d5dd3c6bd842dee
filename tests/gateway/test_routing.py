"""Names, replicas and the way the table is followed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ApiError
from engine.gateway.loading import first_line, not_ready, remaining_s
from engine.gateway.routing import Directory
from engine.gateway.upstream import Upstream
from engine.gateway.watch import RouteWatch
from engine.routes import ModelRoute, Replica, RouteTable
from tests.gateway.dummy import until
from tests.gateway.scheduler import FakeScheduler


def directory() -> Directory:
    return Directory(lambda id, address: Upstream(id, address, connect_timeout_s=1))


def table(version: int, *ids: str, **more: Any) -> RouteTable:
    replicas = [Replica(id="r", socket="/nowhere")]
    rows = [ModelRoute(id=id, category="chat", state="ready", replicas=replicas, **more) for id in ids]
    return RouteTable(version=version, models=rows)


async def test_names_and_aliases_are_found() -> None:
    known = directory()
    known.replace(table(1, "smol", aliases=["gpt-4", "org/smol"]))
    assert known.find("gpt-4") is known.find("org/smol") is known.find("smol")
    known.replace(RouteTable(version=2))
    with pytest.raises(ApiError, match="No model is served yet"):
        known.find("smol")


async def test_an_alias_never_hides_a_model() -> None:
    known = directory()
    known.replace(table(1, "a", "b", aliases=["b"]))
    assert known.find("b").route.id == "b"


async def test_counts_survive_a_new_table() -> None:
    known = directory()
    known.replace(table(1, "a"))
    upstream = known.find("a").choose()
    assert upstream is not None
    upstream.taken()
    known.replace(table(2, "a"))
    assert known.find("a").choose() is upstream
    assert upstream.in_flight == 1


async def test_equals_take_turns_and_failed_ones_are_left_out() -> None:
    known = directory()
    replicas = [Replica(id=str(i), url=f"http://host{i}:1") for i in range(3)]
    known.replace(RouteTable(models=[ModelRoute(id="a", category="chat", replicas=replicas)]))
    served = known.find("a")
    assert {each.id for _ in range(3) if (each := served.choose())} == {"0", "1", "2"}
    assert {each.id for _ in range(9) if (each := served.choose({"http://host1:1"}))} == {"0", "2"}
    assert served.choose({f"http://host{i}:1" for i in range(3)}) is None


def test_time_left_counts_from_when_it_was_said() -> None:
    row = ModelRoute(id="a", category="chat", eta_s=30, at=1000)
    assert remaining_s(row, 1010) == 20
    assert remaining_s(row, 990) == 30
    assert remaining_s(row, 2000) == 0
    assert remaining_s(ModelRoute(id="a", category="chat"), 0) is None


@pytest.mark.parametrize(
    ("state", "left", "said"),
    [
        ("starting", 12.0, "loading. It should be ready in about 12 s; try again in 12 s."),
        ("preparing", 600.0, "fetched or converted. It should be ready in about 10 min; try again in 120 s."),
        ("backoff", None, "started again. How long it takes is not known yet; try again in 10 s."),
        ("ready", 0.0, "without a runner at this moment. It should be ready any moment; try again in 1 s."),
    ],
)
def test_what_a_model_that_is_not_ready_says(state: Any, left: float | None, said: str) -> None:
    error = not_ready(ModelRoute(id="a", category="chat", state=state, eta_s=left, at=5), now=5)
    assert error.message.endswith(said)
    assert error.message.startswith("Model 'a' is not ready: it is ")


def test_only_a_reasons_first_line_is_shown() -> None:
    assert first_line("exit status 1.\nTraceback …") == "exit status 1"
    assert len(first_line("x" * 1000)) <= 301


async def test_the_schedulers_table_is_followed_and_kept_while_it_is_away(short: Path) -> None:
    known = directory()
    scheduler = FakeScheduler(short / "c.sock")
    scheduler.table = table(5, "a")
    await scheduler.start()
    watch = RouteWatch(known, socket=scheduler.path, file=short / "r.json", first_backoff_s=0.005)
    await watch.start()
    try:
        await until(lambda: known.version == 5)
        scheduler.publish(table(6, "a", "b"))
        await until(lambda: known.version == 6)
        assert scheduler.polls[:2] == ["-1", "5"]
        await scheduler.stop()
        await asyncio.sleep(0.02)
        assert known.find("b").route.id == "b"
        # A scheduler that has just started has nothing to say yet; then it counts on from its mirror.
        scheduler = FakeScheduler(short / "c.sock")
        scheduler.table = RouteTable(version=6)
        await scheduler.start()
        await until(lambda: bool(scheduler.polls))
        assert known.find("b").route.id == "b"
        scheduler.publish(table(7, "c"))
        await until(lambda: known.version == 7)
        # Another scheduler whose numbers begin anew is believed too.
        await scheduler.stop()
        scheduler = FakeScheduler(short / "c.sock")
        scheduler.table = table(1, "d")
        await scheduler.start()
        await until(lambda: known.version == 1)
        assert known.find("d").route.id == "d"
    finally:
        await watch.close()
        await scheduler.stop()


async def test_the_file_is_read_at_the_start_and_when_it_changes(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = directory()
    file = short / "routes.json"
    file.write_text(table(3, "a").model_dump_json())
    watch = RouteWatch(known, socket=short / "none.sock", file=file, first_backoff_s=0.005)
    await watch.start()
    try:
        assert known.version == 3
        file.write_text(table(4, "a", "b").model_dump_json())
        await until(lambda: known.version == 4)
        file.write_text(json.dumps({"version": "x"}))
        await until(lambda: "cannot be read as a route table" in caplog.text)
        assert known.find("b").route.id == "b"
    finally:
        await watch.close()
