"""Warm tiers: who sleeps, who wakes, who makes room for whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.scheduler.memory import host_held
from engine.scheduler.messages import Launch, Restore, Sleep, Sweep, Wake, WakeFailed, Withdraw
from engine.scheduler.outlook import outlook
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.publish import make_routes
from engine.scheduler.statefile import UnitRecord
from engine.scheduler.status import SchedulerStatus, Status, make_status
from engine.scheduler.units import Placed

from .support import POLICY, standing
from .tier_stage import Stage

RESIDENCE = POLICY.min_residence_s
ROOM = {"cuda:0": 7}


@pytest.fixture
def pair(tmp_path: Path) -> Stage:
    """Two standby models of which one can be awake (5 + 1 of 7), both asleep."""
    return settled([standing(tmp_path, "a"), standing(tmp_path, "b")])


def settled(runners: list[RunnerPlan], room: dict[str, int] | None = None, **fields: object) -> Stage:
    stage = Stage(runners, ROOM if room is None else room, **fields)  # type: ignore[arg-type]
    stage.answer_all()
    return stage


def wake(stage: Stage, model: str) -> str:
    """A request comes and is sent; the replica that got it."""
    stage.request(model)
    stage.answer_all()
    mine = stage.workers[stage.worker()]
    (replica,) = [name for name, count in mine.in_hand.items() if count and name.startswith(f"{model}-")]
    return replica


def used(stage: Stage, model: str) -> None:
    """A request is sent and ends."""
    stage.finish(wake(stage, model))
    stage.report(stage.worker())


def test_each_standby_model_is_loaded_once_answers_and_falls_asleep(pair: Stage) -> None:
    assert pair.states() == {"a-0": "asleep", "b-0": "asleep"}
    assert [pair.count(kind, name) for kind in (Launch, Sleep) for name in ("a-0", "b-0")] == [1] * 4
    # One at a time: two awake would not fit.
    order = [type(action) for action in pair.done if isinstance(action, Launch | Sleep)]
    runners = [kind for kind, action in zip(order, order, strict=True)]
    assert runners[-4:] == [Launch, Sleep, Launch, Sleep]
    assert not any(pair.tables), "asleep models are not in the route table"


def test_the_first_request_wakes_it_and_it_stays_awake(pair: Stage) -> None:
    assert wake(pair, "a") == "a-0"
    assert pair.states() == {"a-0": "ready", "b-0": "asleep"}
    pair.finish("a-0")
    pair.report(pair.worker())
    pair.pass_time(3600)
    assert pair.state("a-0") == "ready" and not pair.count(Withdraw, "a-0")


def test_a_woken_model_is_not_ready_before_it_answered(pair: Stage) -> None:
    pair.request("a")
    assert (pair.state("a-0"), pair.tables[-1]) == ("waking", {})
    pair.answer_all()
    assert pair.tables[-1] == {"a": ["a-0"]}
    assert 0.0 <= pair.world.wakes["a"] < 1.0


def test_an_idle_model_makes_room_after_its_residence(pair: Stage) -> None:
    used(pair, "a")
    pair.request("b")
    assert pair.pass_time(RESIDENCE - 1) == [] or not pair.count(Withdraw, "a-0")
    assert pair.state("a-0") == "ready"
    pair.pass_time(2)
    assert pair.state("a-0") == "draining"
    assert pair.world.units["a-0"].reason == "making room for b"
    pair.answer_all()
    assert pair.states() == {"a-0": "asleep", "b-0": "ready"}
    assert (pair.count(Withdraw, "a-0"), pair.count(Sleep, "a-0"), pair.count(Wake, "b-0")) == (1, 2, 1)


def test_the_victim_sleeps_only_when_every_worker_uses_a_table_without_it(tmp_path: Path) -> None:
    stage = settled([standing(tmp_path, "a"), standing(tmp_path, "b")], gateways=2)
    used(stage, "a")
    stage.report(stage.worker(1))
    stage.pass_time(RESIDENCE)
    stage.request("b")
    assert stage.state("a-0") == "draining"
    stage.report(stage.worker(0))  # still with the old table
    assert not stage.world.units["a-0"].moving
    stage.keep_up(stage.worker(0))
    assert not stage.world.units["a-0"].moving
    stage.keep_up(stage.worker(1))
    assert stage.world.units["a-0"].moving


def test_a_request_that_came_in_between_gives_the_victim_its_place_back(pair: Stage) -> None:
    used(pair, "a")
    pair.pass_time(RESIDENCE)
    pair.request("b")
    assert pair.state("a-0") == "draining"
    assert pair.request("a") == "a-0"  # this worker's table still has it
    pair.keep_up(pair.worker())
    pair.pass_time(POLICY.quiet_s)
    assert pair.state("a-0") == "ready" and pair.tables[-1] == {"a": ["a-0"]}
    pair.keep_up(pair.worker())
    pair.pass_time(30)
    assert pair.count(Withdraw, "a-0") == 1, "a busy one is left alone"
    pair.finish("a-0")
    pair.report(pair.worker())
    pair.answer_all()
    assert pair.states() == {"a-0": "asleep", "b-0": "ready"}


def test_a_short_request_in_between_is_waited_for(pair: Stage) -> None:
    used(pair, "a")
    pair.pass_time(RESIDENCE)
    pair.request("b")
    pair.request("a")
    pair.keep_up(pair.worker())
    pair.now += POLICY.quiet_s / 2
    pair.finish("a-0")
    pair.report(pair.worker())
    pair.answer_all()
    assert pair.states() == {"a-0": "asleep", "b-0": "ready"} and not pair.count(Restore, "a-0")


def test_a_worker_that_is_silent_is_taken_to_be_busy(pair: Stage) -> None:
    used(pair, "a")
    pair.pass_time(RESIDENCE)
    pair.request("b")
    pair.pass_time(POLICY.acknowledge_s - 0.1)
    assert pair.state("a-0") == "draining"
    pair.pass_time(0.2)
    assert pair.state("a-0") == "ready"
    before = pair.count(Withdraw, "a-0")
    pair.pass_time(POLICY.spare_s / 2)
    assert pair.count(Withdraw, "a-0") == before, "no hot loop"


def test_the_runners_own_refusal_puts_it_back(pair: Stage) -> None:
    used(pair, "a")
    pair.pass_time(RESIDENCE)
    pair.request("b")
    pair.keep_up(pair.worker())
    assert pair.world.units["a-0"].moving
    pair.workers[pair.worker()].in_hand["a-0"] += 1  # sent by somebody who does not report
    pair.answer()
    assert pair.state("a-0") == "ready" and pair.tables[-1] == {"a": ["a-0"]}
    pair.workers[pair.worker()].in_hand["a-0"] -= 1
    pair.answer_all()
    pair.pass_time(POLICY.spare_s)
    pair.answer_all()
    assert pair.states() == {"a-0": "asleep", "b-0": "ready"}


def test_many_who_ask_join_one_wake(tmp_path: Path) -> None:
    stage = settled([standing(tmp_path, "a")], gateways=3)
    for index in range(3):
        for _ in range(5):
            stage.request("a", stage.worker(index))
    stage.answer_all()
    assert stage.count(Wake, "a-0") == 1 and not stage.world.demands
    assert [worker.in_hand["a-0"] for worker in stage.workers.values()] == [5, 5, 5]


def test_a_client_that_leaves_takes_its_place_with_it(pair: Stage) -> None:
    used(pair, "a")
    pair.request("b")
    pair.request("b")
    pair.leave("b")
    assert "b" in pair.world.demands
    pair.leave("b")
    assert "b" not in pair.world.demands
    pair.pass_time(100)
    assert pair.states() == {"a-0": "ready", "b-0": "asleep"} and not pair.count(Withdraw, "a-0")


def test_a_victim_is_put_back_when_nobody_needs_its_room_any_more(pair: Stage) -> None:
    used(pair, "a")
    pair.pass_time(RESIDENCE)
    pair.request("b")
    assert pair.state("a-0") == "draining"
    assert Restore("a-0") in pair.leave("b")
    assert pair.tables[-1] == {"a": ["a-0"]}


def test_a_busy_or_pinned_model_makes_no_room_and_keeps_no_third_waiting(tmp_path: Path) -> None:
    stage = settled(
        [standing(tmp_path, "a", pinned=True), standing(tmp_path, "b"), standing(tmp_path, "c", awake=2)],
        {"cuda:0": 9},
    )
    used(stage, "a")
    stage.pass_time(1000)
    stage.request("b")
    assert wake(stage, "c") == "c-0"
    stage.pass_time(1000)
    assert stage.states() == {"a-0": "ready", "b-0": "asleep", "c-0": "ready"}
    assert not any(isinstance(action, Withdraw) for action in stage.done)
    assert "b" in stage.world.demands


def test_the_least_recently_used_of_the_lowest_priority_makes_room(tmp_path: Path) -> None:
    names = {"a": 0, "b": 0, "c": 1, "d": 0}
    plans = [standing(tmp_path, name, priority=priority) for name, priority in names.items()]
    stage = settled(plans, {"cuda:0": 16})
    for name in ("c", "a", "b"):
        used(stage, name)
        stage.pass_time(1)
    stage.pass_time(RESIDENCE)
    used(stage, "a")  # b was woken last, but a is used last
    stage.request("d")
    stage.answer_all()
    assert stage.states() == {"a-0": "ready", "b-0": "asleep", "c-0": "ready", "d-0": "ready"}


def test_the_higher_priority_is_woken_first_then_the_first_come(tmp_path: Path) -> None:
    names = {"a": 0, "b": 0, "c": 0, "d": 1}
    stage = settled([standing(tmp_path, n, priority=p) for n, p in names.items()], {"cuda:0": 8})
    used(stage, "a")
    for name in ("c", "b", "d"):
        stage.now += 0.1
        stage.request(name)
    woken = []
    for _ in range(3):
        stage.pass_time(RESIDENCE + 1)
        stage.answer_all()
        (name,) = [unit.removesuffix("-0") for unit, state in stage.states().items() if state == "ready"]
        woken.append(name)
        stage.finish(f"{name}-0")
        stage.report(stage.worker())
    assert woken == ["d", "c", "b"]


def test_two_that_are_always_asked_for_take_turns_of_a_residence_each(pair: Stage) -> None:
    began = pair.now
    for _ in range(200):
        for model in ("a", "b"):
            mine = pair.workers[pair.worker()]
            if model not in mine.waiting and not mine.in_hand[f"{model}-0"]:
                pair.request(model)
        pair.answer_all()
        for name in ("a-0", "b-0"):
            if pair.workers[pair.worker()].in_hand[name]:
                pair.finish(name)
        pair.report(pair.worker())
        pair.answer_all()
        pair.pass_time(1)
        pair.answer_all()
    turns = (pair.now - began) / RESIDENCE
    wakes = pair.count(Wake, "a-0") + pair.count(Wake, "b-0")
    assert turns - 3 <= wakes <= turns + 1
    assert abs(pair.count(Wake, "a-0") - pair.count(Wake, "b-0")) <= 1


def test_nobody_is_taken_out_of_the_table_where_that_would_not_be_enough(tmp_path: Path) -> None:
    plans = [standing(tmp_path, "a"), standing(tmp_path, "b", pinned=True), standing(tmp_path, "c", awake=9)]
    stage = settled(plans, {"cuda:0": 11})
    used(stage, "a")
    used(stage, "b")
    stage.pass_time(RESIDENCE)
    stage.request("c")
    stage.pass_time(100)
    assert stage.states() == {"a-0": "ready", "b-0": "ready", "c-0": "asleep"}
    assert not stage.count(Withdraw, "a-0")


def test_two_make_room_for_one_on_two_devices(tmp_path: Path) -> None:
    plans = [
        standing(tmp_path, "a", "cuda:0"),
        standing(tmp_path, "b", "cuda:1"),
        standing(tmp_path, "c", "cuda:0,1"),
    ]
    stage = settled(plans, {"cuda:0": 7, "cuda:1": 7})
    used(stage, "a")
    used(stage, "b")
    stage.pass_time(RESIDENCE)
    stage.request("c")
    stage.answer_all()
    assert stage.states() == {"a-0": "asleep", "b-0": "asleep", "c-0": "ready"}


def test_one_that_need_not_go_stays(tmp_path: Path) -> None:
    """c needs 6: the older a (2) would not be enough, so b (6) goes, and then a need not."""
    plans = [standing(tmp_path, "a", awake=2, asleep=0), standing(tmp_path, "b", awake=6, asleep=0)]
    plans.append(standing(tmp_path, "c", awake=6, asleep=0))
    stage = settled(plans, {"cuda:0": 8})
    used(stage, "a")
    stage.pass_time(1)
    used(stage, "b")
    stage.pass_time(RESIDENCE)
    stage.request("c")
    stage.answer_all()
    assert stage.states() == {"a-0": "ready", "b-0": "asleep", "c-0": "ready"}


def test_residents_have_their_room_though_they_do_not_run(tmp_path: Path) -> None:
    resident = standing(tmp_path, "r", tier="resident")
    stage = settled([resident, standing(tmp_path, "a"), standing(tmp_path, "b")], {"cuda:0": 11})
    used(stage, "a")
    stage.die("r-0")
    stage.tell_exit(stage.untold[0])
    stage.answer(next(i for i, (action, _) in enumerate(stage.asked) if isinstance(action, Sweep)))
    stage.request("b")
    stage.pass_time(POLICY.backoff_first_s / 2)
    assert stage.states() == {"r-0": "backoff", "a-0": "ready", "b-0": "asleep"}, "5 of 11 stay reserved"
    stage.pass_time(1)
    stage.answer_all()
    assert stage.state("r-0") == "ready" and stage.state("b-0") == "asleep"


def test_a_killed_sleeper_is_loaded_again_when_there_is_room(pair: Stage) -> None:
    wake(pair, "a")
    pair.die("b-0")
    pair.tell_exit(pair.untold[0])
    pair.answer_all()
    pair.pass_time(100)
    assert pair.state("b-0") == "backoff", "a is in use"
    pair.finish("a-0")
    pair.report(pair.worker())
    pair.pass_time(RESIDENCE / 2)
    assert pair.state("a-0") == "ready", "a load for later takes nobody's place who was used just now"
    pair.pass_time(RESIDENCE)
    pair.answer_all()
    assert pair.states() == {"a-0": "asleep", "b-0": "asleep"} and pair.count(Launch, "b-0") == 2


def test_a_load_for_later_does_not_go_before_a_request(pair: Stage) -> None:
    used(pair, "a")
    pair.die("b-0")
    pair.tell_exit(pair.untold[0])
    pair.answer_all()
    pair.pass_time(RESIDENCE + 1)
    assert pair.state("a-0") == "draining"
    pair.now += 0.1
    pair.take_table(pair.worker())
    pair.request("a")
    assert pair.state("a-0") == "ready" and Restore("a-0", asked=True) in pair.done


def test_a_model_asked_for_while_it_loads_does_not_fall_asleep(tmp_path: Path) -> None:
    stage = Stage([standing(tmp_path, "a")], ROOM)
    while not any(isinstance(action, Launch) and action.unit == "a-0" for action in stage.done):
        stage.answer()
    stage.request("a")
    stage.answer_all()
    assert stage.state("a-0") == "ready" and not stage.count(Sleep, "a-0")


def test_a_first_sleep_waits_for_a_request_that_an_old_table_sent_there(tmp_path: Path) -> None:
    stage = Stage([standing(tmp_path, "a")], ROOM)
    stage.take_table(stage.worker())
    # From before it was started again: the socket's name is the same.
    stage.workers[stage.worker()].in_hand["a-0"] = 1
    stage.workers[stage.worker()].used["a-0"] = stage.now
    stage.report(stage.worker())
    stage.answer_all()
    assert stage.state("a-0") == "ready" and not stage.count(Sleep, "a-0")


def test_one_that_cannot_wake_is_started_again_for_those_who_wait(pair: Stage) -> None:
    pair.request("a")
    ref = pair.world.units["a-0"].process
    assert ref is not None
    pair.asked = [one for one in pair.asked if not isinstance(one[0], Wake)]
    pair.happen(WakeFailed("a-0", ref, "waking up took longer than 120 s"))
    assert pair.state("a-0") == "failed" and "longer than 120 s" in pair.world.units["a-0"].reason
    pair.answer_all()
    pair.pass_time(10)
    pair.answer_all()
    assert pair.state("a-0") == "ready" and pair.count(Launch, "a-0") == 2


def test_host_memory_bounds_who_may_sleep(tmp_path: Path) -> None:
    plans = [standing(tmp_path, "a", host=4), standing(tmp_path, "b", host=4)]
    stage = settled(plans, {"cuda:0": 20}, host_room=6)
    assert sorted(stage.states().values()) == ["asleep", "ready"]
    assert host_held(stage.world) == 4


def test_on_a_cpu_sleep_and_load_need_no_turn(tmp_path: Path) -> None:
    plans = [standing(tmp_path, "a", "cpu:0"), standing(tmp_path, "b", "cpu:0")]
    stage = Stage(plans, {"cpu:0": 20})
    assert [stage.state(name) for name in ("a-0", "b-0")] == ["starting", "starting"]


def test_on_a_gpu_one_at_a_time_loads_whatever_else_may(tmp_path: Path) -> None:
    plans = [standing(tmp_path, name, tier="resident", awake=1) for name in ("a", "b")]
    plans.append(standing(tmp_path, "c", "cuda:0,1", tier="resident", awake=1))
    plans.append(standing(tmp_path, "d", "cuda:1", tier="resident", awake=1))
    stage = Stage(plans, {"cuda:0": 9, "cuda:1": 9})
    loading = [name for name, state in stage.states().items() if state == "starting"]
    assert loading == ["a-0", "d-0"]
    stage.answer_all()
    assert set(stage.states().values()) == {"ready"}


def test_of_two_replicas_the_one_with_room_wakes(tmp_path: Path) -> None:
    plans = [standing(tmp_path, "m", "cuda:0"), standing(tmp_path, "m", "cuda:1", number=1)]
    stage = settled([*plans, standing(tmp_path, "a", "cuda:0")], {"cuda:0": 7, "cuda:1": 7})
    used(stage, "a")
    stage.pass_time(RESIDENCE)
    assert wake(stage, "m") == "m-1"
    assert stage.states() == {"m-0": "asleep", "m-1": "ready", "a-0": "ready"}


def left(plan: RunnerPlan, pid: int, state: str) -> UnitRecord:
    placed = Placed(plan.devices, plan.awake_bytes, plan.asleep_bytes)
    return UnitRecord.model_validate(
        {
            "id": plan.id,
            "kind": "runner",
            "pid": pid,
            "started": pid,
            "token": str(pid),
            "fingerprint": plan.fingerprint,
            "device": plan.device,
            "state": state,
            "placed": placed,
        }
    )


def test_sleepers_of_a_killed_scheduler_are_taken_over_asleep(tmp_path: Path) -> None:
    a, b = standing(tmp_path, "a"), standing(tmp_path, "b")
    stage = Stage([a, b], ROOM, left=[left(a, 7, "asleep"), left(b, 8, "ready")])
    assert stage.states() == {"a-0": "asleep", "b-0": "ready"}
    stage.served_since["b-0"] = stage.now
    stage.answer_all()
    assert not stage.count(Launch, "a-0")
    assert wake(stage, "b") == "b-0"


@pytest.mark.parametrize(("sleeps", "state"), [(True, "asleep"), (False, "ready")])
def test_one_left_half_way_is_asked_which(tmp_path: Path, sleeps: bool, state: str) -> None:
    a, b = standing(tmp_path, "a"), standing(tmp_path, "b")
    stage = Stage([a, b], ROOM, left=[left(a, 7, "moving"), left(b, 8, "asleep")])
    assert stage.state("a-0") == "waking" and stage.world.units["a-0"].moving
    if sleeps:
        stage.sleeping.add(left(a, 7, "moving").process)
    stage.answer_all()
    assert stage.state("a-0") == state


def test_one_with_another_size_than_before_is_ended_before_the_room_is_used(tmp_path: Path) -> None:
    a = standing(tmp_path, "a")
    before = replace(a, fingerprint="before", awake_bytes=6)
    stage = Stage([a], ROOM, left=[left(before, 7, "ready")])
    assert stage.state("a-0") == "draining"
    stage.answer_all()
    assert stage.state("a-0") == "asleep" and stage.count(Launch, "a-0") == 1


def test_what_a_person_is_told(pair: Stage) -> None:
    def told(name: str) -> tuple[str, str, float | None]:
        seen = outlook(pair.world, pair.world.units[name], pair.now)
        return seen.state, seen.reason, seen.eta_s

    assert told("a-0") == ("asleep", "asleep; the first request wakes it", 2.0), "a tenth of a start"
    pair.world.wakes["a"] = 4.0
    pair.request("a")
    pair.now += 1.0
    assert told("a-0") == ("waking", "waking up", 3.0)
    pair.answer_all()
    assert pair.world.wakes["a"] == pytest.approx(1.0, abs=0.5)
    pair.request("b")
    assert told("b-0") == ("asleep", "asleep; waiting until there is room", 2.0)
    pair.finish("a-0")
    pair.report(pair.worker())
    pair.pass_time(RESIDENCE)
    assert told("a-0")[:2] == ("draining", "making room for b")
    row = make_routes(pair.world, pair.now, 5.0, 1)[0]
    assert (row.state, row.tier, row.wake_wait_s) == ("draining", "standby", POLICY.wake_wait_s)


def test_all_is_well_though_some_sleep_or_wake(tmp_path: Path) -> None:
    stage = Stage([standing(tmp_path, "r", tier="resident"), standing(tmp_path, "a")], {"cuda:0": 12})

    def status() -> Status:
        me = SchedulerStatus(pid=1, started=0.0)
        return make_status(stage.world, stage.now, scheduler=me, profile="p", base_url="http://h/v1")

    assert not status().ready
    stage.answer_all()
    assert (status().ready, status().asleep) == (True, 1)
    assert [(one.room_bytes, one.held_bytes) for one in status().devices] == [(12, 6)]
    stage.request("a")
    assert (status().ready, status().models[1].state) == (True, "waking")
    stage.answer_all()
    assert (status().asleep, status().devices[0].held_bytes) == (0, 10)
    stage.die("a-0")
    stage.tell_exit(stage.untold[0])
    assert not status().ready
