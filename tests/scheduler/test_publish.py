"""The route table and the outlook on what is not ready."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.routes import ModelRoute, RouteTable
from engine.scheduler.outlook import model_outlook, outlook
from engine.scheduler.publish import RouteBoard, is_news, make_routes
from engine.scheduler.status import SchedulerStatus, make_status
from engine.scheduler.transitions import begin
from engine.scheduler.units import Progress, World
from models.entry import FillInTheMiddle

from .support import POLICY, entry, gateway_plan, preparation_plan, runner_plans


def world(tmp_path: Path) -> World:
    fim = FillInTheMiddle(template="{prefix}{suffix}", stop=["<s>"])
    entries = [
        entry("a", aliases=["A"], fim=fim),
        entry("e", category="embedding", engine="sentence-transformers"),
    ]
    runners = runner_plans(tmp_path, *entries)
    made = World(policy=POLICY)
    begin(made, [gateway_plan(), *map(preparation_plan, runners), *runners], [], 100.0)
    return made


def test_rows_carry_what_gateways_need(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.units["a-0"].become("ready", 100.0)
    a, e = make_routes(made, 100.0, 5000.0, 17)
    assert (a.id, a.aliases, a.fim_template, a.fim_stop, a.created) == (
        "a",
        ["A"],
        "{prefix}{suffix}",
        ["<s>"],
        17,
    )
    assert (a.state, a.reason, a.eta_s, a.at, a.replicas[0].id) == ("ready", "", 0.0, 5000.0, "a-0")
    assert a.max_in_flight == 8 + 256 and e.max_in_flight is None
    assert (e.state, e.replicas) == ("planned", [])


def test_one_ready_replica_makes_a_model_ready(tmp_path: Path) -> None:
    runners = runner_plans(tmp_path, entry("a"), models={"a": {"replicas": 2}})
    made = World(policy=POLICY)
    begin(made, runners, [], 0.0)
    made.units["a-1"].become("ready", 1.0)
    made.units["a-0"].become("failed", 1.0, "its process has ended with status 1")
    (row,) = make_routes(made, 2.0, 2.0, 0)
    assert row.state == "ready" and [replica.id for replica in row.replicas] == ["a-1"]
    assert model_outlook(made, list(made.of_kind("runner")), 2.0).state == "ready"
    status = make_status(
        made, 2.0, scheduler=SchedulerStatus(pid=1, started=0.0), profile="p", base_url="http://h/v1"
    )
    assert not status.ready and status.models[0].replicas[0].reason.endswith("status 1")


def test_the_estimate_counts_down_and_an_overdue_start_is_not_promised_at_once(tmp_path: Path) -> None:
    made = world(tmp_path)
    unit = made.units["a-0"]
    unit.become("starting", 100.0)
    unit.started_at = 100.0
    etas = [outlook(made, unit, now).eta_s for now in (100.0, 115.0, 119.9, 140.0)]
    assert etas == [20.0, 5.0, 1.0, 10.0]
    made.durations["a"] = 50.0
    assert outlook(made, unit, 110.0).eta_s == 40.0


def test_waiting_for_a_start_place_counts_those_before(tmp_path: Path) -> None:
    runners = runner_plans(tmp_path, entry("a"), entry("b"), entry("c"))
    made = World(policy=POLICY)
    begin(made, [*map(preparation_plan, runners), *runners], [], 0.0)
    for name in "abc":
        made.units[f"prepare-{name}"].become("ready", 0.0)
    for name in "ab":
        made.units[f"{name}-0"].become("starting", 0.0)
    seen = outlook(made, made.units["c-0"], 5.0)
    assert (seen.state, seen.reason, seen.eta_s) == ("planned", "waiting for its turn to load", 15.0 + 20.0)


def test_a_preparation_shows_its_progress_and_what_it_still_takes(tmp_path: Path) -> None:
    made = world(tmp_path)
    weights = made.units["prepare-a"]
    weights.become("starting", 100.0)
    weights.started_at = 100.0
    assert outlook(made, made.units["a-0"], 101.0).state == "preparing"
    assert outlook(made, made.units["a-0"], 101.0).eta_s is None
    weights.progress = Progress("download", 25.0, 100.0, "bytes", "from /a/folder")
    seen = outlook(made, made.units["a-0"], 110.0)
    assert (seen.reason, seen.eta_s) == ("downloading its weights", 30.0 + 20.0)


def test_backoff_counts_the_wait(tmp_path: Path) -> None:
    made = world(tmp_path)
    unit = made.units["a-0"]
    unit.become("backoff", 100.0, "its process was killed by signal 9 (SIGKILL)")
    unit.retry_at = 104.0
    assert outlook(made, unit, 101.0).eta_s == pytest.approx(3.0 + 20.0)


def row(**fields: object) -> ModelRoute:
    return ModelRoute.model_validate({"id": "a", "category": "chat", "state": "starting"} | fields)


def test_the_plain_passing_of_time_is_no_news() -> None:
    assert not is_news([row(at=10.0, eta_s=20.0)], [row(at=15.0, eta_s=15.0)])
    assert is_news([row(at=10.0, eta_s=20.0)], [row(at=15.0, eta_s=25.0)])
    assert is_news([row(at=10.0)], [row(at=10.0, eta_s=25.0)])
    assert is_news([row()], [row(state="warming")])
    assert is_news([row()], [row(), row(id="b")])
    assert not is_news([row(state="ready", at=1.0, eta_s=0.0)], [row(state="ready", at=99.0, eta_s=0.0)])


async def test_the_board_numbers_mirrors_and_wakes_its_watchers(tmp_path: Path) -> None:
    mirror = tmp_path / "routes.json"
    mirror.write_text(RouteTable(version=41).model_dump_json())
    board = RouteBoard(mirror)
    watches = [asyncio.create_task(board.after(41, 30)) for _ in range(3)]
    await asyncio.sleep(0)
    assert board.publish([row()]) and not board.publish([row()])
    assert [table.version for table in await asyncio.gather(*watches)] == [42] * 3
    assert RouteTable.model_validate_json(mirror.read_bytes()) == board.table
    assert (await board.after(7, 30)).version == 42  # behind, or of another line altogether: told at once
    assert (await board.after(42, 0)).version == 42
    assert (await board.after(42, 0.01)).version == 42


def test_a_broken_mirror_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "routes.json").write_text("{")
    assert RouteBoard(tmp_path / "routes.json").table.version == 0
