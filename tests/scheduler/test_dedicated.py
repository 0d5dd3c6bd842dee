"""Replicas and GPUs that tenants own, as the scheduler plans, shows, keeps and publishes them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Config, ConfigError, load
from engine.planner.ownership import family
from engine.routes import ModelRoute
from engine.scheduler import statefile
from engine.scheduler.dedicated import device_kinds
from engine.scheduler.devices import Device
from engine.scheduler.memory import held
from engine.scheduler.plan import PlanError, RunnerPlan, make_plan
from engine.scheduler.publish import is_news, make_routes
from engine.scheduler.reload import adopted, make_setup, prepare
from engine.scheduler.renewal import renew, survey
from engine.scheduler.replan import Stood, replan
from engine.scheduler.reports import Waiters, WakeRefusedError
from engine.scheduler.scaling import scalable
from engine.scheduler.seats import elsewhere
from engine.scheduler.status import SchedulerStatus, Status, make_status
from engine.scheduler.transitions import begin
from engine.scheduler.units import Leaving, ProcessRef, World
from models.catalog import load_catalog
from models.profile import Profile

from .support import GIB, HOST, POLICY, catalog, config, entry, gateway_plan, profile
from .test_plan_gpus import machine, wanted
from .test_replan import replica

M = entry("m")
EMBEDDER: dict[str, Any] = {"category": "embedding", "engine": "sentence-transformers"}


def owning(tmp_path: Path, dedicated: dict[str, Any], **fields: Any) -> Config:
    return config(tmp_path, dedicated=dedicated, **fields)


def planned(
    tmp_path: Path, dedicated: dict[str, Any], *names: str, devices: list[Device] = HOST, **fields: Any
) -> list[RunnerPlan]:
    entries = [entry(name) for name in {*names, "other"}]
    return make_plan(owning(tmp_path, dedicated, **fields), profile(*names), catalog(*entries), devices)


def world_of(plans: list[RunnerPlan]) -> World:
    world = World(policy=POLICY, room={"cpu:0": 64 * GIB})
    begin(world, plans, [], 0.0)
    return world


def alive(world: World, *names: str) -> None:
    for number, name in enumerate(names):
        unit = world.units[name]
        assert isinstance(unit.plan, RunnerPlan)
        unit.process = ProcessRef(100 + number, 1, f"token-{name}")
        unit.running = unit.plan.fingerprint
        unit.become("ready", 1.0)


def status_of(world: World) -> Status:
    return make_status(
        world, 2.0, scheduler=SchedulerStatus(pid=1, started=0.0), profile="p", base_url="http://h/v1"
    )


# The plan


def test_owned_replicas_stand_beside_the_shared_ones(tmp_path: Path) -> None:
    plans = planned(tmp_path, {"acme": {"models": {"m": 2}}}, "m", "n")
    assert [(plan.id, plan.owner) for plan in plans] == [
        ("m-0", None), ("n-0", None), ("m@acme-0", "acme"), ("m@acme-1", "acme")
    ]  # fmt: skip
    assert len({plan.spec.socket for plan in plans}) == 4
    assert plans[2].spec.model == "m" and plans[2].awake_bytes == plans[0].awake_bytes
    assert sum(held(world_of(plans)).values()) == 4 * GIB


def test_they_are_always_awake_whatever_the_tier_of_the_shared(tmp_path: Path) -> None:
    known = catalog(entry("m", **EMBEDDER))
    settings = owning(
        tmp_path,
        {"acme": {"models": {"m": 1}}},
        models={"m": {"tier": "standby", "min_replicas": 1, "max_replicas": 3, "priority": 7}},
    )
    shared, own = make_plan(settings, profile("m"), known, HOST)
    assert (shared.standing.tier, shared.spec.can_sleep) == ("standby", True)
    assert (own.standing.tier, own.spec.can_sleep, own.asleep_bytes) == ("resident", False, 0)
    assert (own.standing.min_replicas, own.standing.max_replicas, own.standing.priority) == (1, 1, 7)


def test_a_model_may_be_one_tenants_alone(tmp_path: Path) -> None:
    plans = planned(tmp_path, {"acme": {"models": {"other": 1}}}, "m")
    assert [plan.id for plan in plans] == ["m-0", "other@acme-0"]
    disabled = planned(tmp_path, {"acme": {"models": {"m": 1}}}, "m", models={"m": {"enabled": False}})
    assert [plan.id for plan in disabled] == ["m@acme-0"]


@pytest.mark.parametrize(
    ("dedicated", "said"),
    [
        ({"acme": {"models": {"mm": 1}}}, r"acme\]: model 'mm' is not in the catalog.*Did you mean m"),
        ({"acme": {}}, r"\[dedicated.acme\]: the tenant owns nothing. Name its models"),
        ({"acme": {"gpus": [1]}}, r"owns GPUs 1 but no models"),
        ({"acme": {"models": {"m": 1}, "gpus": [0]}}, r"GPU 0 is not there; there are none for this profile"),
        ({"Acme Inc": {"models": {"other": 1}, "spill_over": True}}, r'\[dedicated."Acme Inc"\]: spill_over'),
        ({"acme": {"models": {"m": 64}}}, r"each of acme's replicas \(64\).*take it out of \[dedicated\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_owned_is_told(tmp_path: Path, dedicated: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        planned(tmp_path, dedicated, "m")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[dedicated.acme]\nmodels = { m = 0 }", "dedicated.acme.models.m: Input should be greater than"),
        ("[dedicated.acme]\ngpus = [-1]", "dedicated.acme.gpus.0: "),
        ("[dedicated.acme]\nspil_over = true", "key 'dedicated.acme.spil_over'. Did you mean 'spill_over'"),
        ('[dedicated." "]\nmodels = { m = 1 }', "a tenant's name has 1 to 200 printable characters"),
        ("[dedicat.acme]\nmodels = { m = 1 }", "Did you mean 'dedicated'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "hearth.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(file)
    assert said in str(refused.value)


def test_replicas_are_named_so_that_no_two_owners_share_one() -> None:
    names = [
        "acme",
        "Acme",
        "acme inc",
        "acme-inc",
        "acme/inc",
        "../etc",
        "ÄÖ",
        "a" * 40,
        "a" * 41,
        "@",
        "a~b",
    ]
    found = [family("m", name) for name in names]
    assert found[0] == "m@acme" and len(set(found)) == len(names)
    assert all("/" not in name and name.isascii() and len(name) < 60 for name in found)
    assert family("m", None) == family("m", "") == "m"


# GPUs


def gpu_plans(tmp_path: Path, dedicated: dict[str, Any], *names: str, count: int = 4) -> list[RunnerPlan]:
    settings = owning(tmp_path, dedicated)
    return make_plan(settings, wanted(*names, gpus=count), load_catalog(), machine(count, "H100"))


def test_on_owned_gpus_stands_the_owner_and_nobody_else(tmp_path: Path) -> None:
    names = ("gemma-3-27b-it", "whisper-large-v3", "bge-m3")
    own = {"acme": {"models": {"whisper-large-v3": 2, "gemma-3-27b-it": 1}, "gpus": [3, 1]}}
    plans = gpu_plans(tmp_path, own, *names)
    assert len(plans) == len(names) + 3
    for plan in plans:
        inside = set(plan.devices) <= {"cuda:1", "cuda:3"}
        assert inside == (plan.owner == "acme"), plan.id
    assert {plan.id for plan in plans if plan.owner} == {
        "whisper-large-v3@acme-0", "whisper-large-v3@acme-1", "gemma-3-27b-it@acme-0"
    }  # fmt: skip


def test_without_gpus_of_its_own_it_stands_among_the_others(tmp_path: Path) -> None:
    plans = gpu_plans(tmp_path, {"acme": {"models": {"bge-m3": 1}}}, "bge-m3", count=1)
    assert [(plan.id, plan.device) for plan in plans] == [("bge-m3-0", "cuda:0"), ("bge-m3@acme-0", "cuda:0")]


@pytest.mark.parametrize(
    ("dedicated", "said"),
    [
        ({"a": {"models": {"bge-m3": 1}, "gpus": [9]}}, r"GPU 9 is not there; there are GPUs 0, 1, 2, 3"),
        (
            {"a": {"models": {"bge-m3": 1}, "gpus": [1]}, "b": {"models": {"bge-m3": 1}, "gpus": [1]}},
            r"\[dedicated.b\]: GPU 1 is named by 'a' too. A GPU has one owner",
        ),
        ({"a": {"models": {"bge-m3": 1}, "gpus": [1, 1]}}, "twice by the same tenant"),
        ({"a": {"models": {"qwen3-32b": 2}, "gpus": [2]}}, r"the emptiest of a's, n0:gpu2, has"),
        ({"a": {"models": {"bge-m3": 1}, "gpus": [0, 1, 2, 3]}}, "every GPU is owned by others"),
    ],
)
def test_gpus_that_cannot_be_owned_are_told(tmp_path: Path, dedicated: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        gpu_plans(tmp_path, dedicated, "bge-m3")


def test_a_gpu_that_gets_an_owner_is_left_by_those_who_stand_there(tmp_path: Path) -> None:
    devices = machine(2, "H100")
    before = make_plan(owning(tmp_path, {}), wanted("bge-m3", gpus=2), load_catalog(), devices)
    (shared,) = before
    number = int(shared.device.partition(":")[2])
    settings = owning(tmp_path, {"acme": {"models": {"whisper-large-v3": 1}, "gpus": [number]}})
    fresh = make_plan(settings, wanted("bge-m3", gpus=2), load_catalog(), devices)
    room = {device.name: device.memory_bytes for device in devices}
    kinds = device_kinds({device.name: device.product for device in devices}, {number: "acme"})
    found = replan([Stood(shared)], fresh, room, kinds=kinds)
    stands = {plan.id: plan.device for plan in found.runners}
    assert stands == {"bge-m3-1": f"cuda:{1 - number}", "whisper-large-v3@acme-0": shared.device}
    assert {change.kind for change in found.changes} == {"moved", "added"}


@given(
    gpus=st.sets(st.integers(0, 3), max_size=3),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=6),
    stood=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_no_reload_mixes_owned_gpus_with_others(
    gpus: set[int], sizes: list[tuple[int, bool, int]], stood: list[bool]
) -> None:
    """Replicas stood anywhere; whatever moves, each ends on its owner's GPUs or on those of nobody."""
    room = {f"cuda:{number}": 12 for number in range(4)}
    kinds = device_kinds(dict.fromkeys(room, "H100"), dict.fromkeys(gpus, "acme"))
    old, fresh = [], []
    free = dict(room)
    for number, (awake, wants_own, at) in enumerate(sizes):
        own = wants_own and bool(gpus)
        homes = [name for name in room if (kinds[name] == "H100 of acme") == own and free[name] >= awake]
        if not homes:
            continue
        free[homes[0]] -= awake
        plan = replica(f"m{number}", homes[0], awake)
        if own:
            plan = replace(plan, id=f"m{number}@acme-0", owner="acme")
        fresh.append(plan)
        if stood[number]:
            old.append(Stood(elsewhere(plan, plan.id, f"cuda:{at}")))
    found = replan(old, fresh, room, kinds=kinds)
    assert len(found.runners) == len(fresh)
    taken = dict.fromkeys(room, 0)
    for plan in found.runners:
        taken[plan.device] += plan.awake_bytes
        owns_gpus = plan.owner == "acme"
        assert (kinds[plan.device] == "H100 of acme") == owns_gpus, f"{plan.id} on {plan.device}"
        assert ("@acme" in plan.id) == owns_gpus
    assert all(taken[name] <= room[name] for name in room)


# A reload and a scheduler that comes after another one


def setup(tmp_path: Path, dedicated: dict[str, Any], which: Profile) -> Any:
    return make_setup(owning(tmp_path, dedicated), which, catalog(M, entry("other")))


def test_a_reload_adds_removes_and_changes_owned_replicas_only(tmp_path: Path) -> None:
    steps: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({}, {"m-0": "kept"}),
        ({"acme": {"models": {"m": 2}}}, {"m-0": "kept", "m@acme-0": "added", "m@acme-1": "added"}),
        ({"acme": {"models": {"m": 1}}}, {"m-0": "kept", "m@acme-0": "kept", "m@acme-1": "removed"}),
        ({"zorg": {"models": {"m": 1}}}, {"m-0": "kept", "m@acme-0": "removed", "m@zorg-0": "added"}),
        ({}, {"m-0": "kept", "m@zorg-0": "removed"}),
    ]
    old = setup(tmp_path, {}, profile("m"))
    world = world_of(old.runners)
    for dedicated, expected in steps:
        alive(world, *(name for name, unit in world.units.items() if not unit.leaving))
        new = setup(tmp_path, dedicated, profile("m"))
        gateways = [gateway_plan()]
        way = prepare(old, new, survey(world), gateways)
        assert {c.unit: c.kind for c in way.runners.changes} == expected
        renew(world, way.gateways, [], way.runners, 2.0)
        for name, unit in [*world.units.items()]:
            if unit.leaving or unit.kind == "gateway":
                del world.units[name]
        old = new


def test_spill_over_changes_without_a_restart(tmp_path: Path) -> None:
    old = setup(tmp_path, {"acme": {"models": {"m": 1}}}, profile("m"))
    world = world_of(old.runners)
    alive(world, "m-0", "m@acme-0")
    new = setup(tmp_path, {"acme": {"models": {"m": 1}, "spill_over": True}}, profile("m"))
    told = prepare(old, new, survey(world), [gateway_plan()]).told(old, dry_run=True)
    (change,) = [one for one in told.changes if one.unit == "m@acme-0"]
    assert (change.kind, change.reason) == ("kept", "spill_over: false → true (no restart)")


def test_who_comes_after_a_killed_scheduler_keeps_each_with_its_owner(tmp_path: Path) -> None:
    made = setup(tmp_path, {"acme": {"models": {"m": 1}}}, profile("m"))
    world = world_of(made.runners)
    alive(world, "m-0", "m@acme-0")
    left = statefile.record(world, scheduler_pid=1, host="h", port=1)
    left = statefile.StateFile.model_validate_json(left.model_dump_json())
    assert [(one.id, one.owner) for one in left.units] == [("m-0", None), ("m@acme-0", "acme")]
    _, kept = adopted(made, [gateway_plan()], left.units)
    assert [(plan.id, plan.owner) for plan in kept] == [("m-0", None), ("m@acme-0", "acme")]
    # One that is another's now, or everybody's, is not taken over though it was started just so.
    other = setup(tmp_path, {"zorg": {"models": {"m": 1}}}, profile("m"))
    only = [one for one in left.units if one.owner]
    _, plans = adopted(other, [gateway_plan()], only)
    world = World(policy=POLICY)
    begin(world, plans, only, 0.0)
    units = {unit.id: unit.process is not None for unit in world.of_kind("runner") if unit.wanted}
    assert units == {"m-0": False, "m@zorg-0": False}


# What is published, shown and scaled


def test_routes_say_whose_each_replica_is(tmp_path: Path) -> None:
    plans = planned(tmp_path, {"acme": {"models": {"m": 1, "other": 1}}, "zorg": {"models": {"m": 1}}}, "m")
    plans = [
        replace(plan, standing=replace(plan.standing, spill_over=plan.owner == "zorg")) for plan in plans
    ]
    world = world_of(plans)
    alive(world, "m-0", "m@acme-0")
    world.units["m@zorg-0"].become("backoff", 1.0, "its process was killed by SIGKILL")
    world.units["m@zorg-0"].retry_at = 9.0
    m, other = make_routes(world, 2.0, 5000.0, 17)
    assert [(one.id, one.owner) for one in m.replicas] == [("m-0", None), ("m@acme-0", "acme")]
    assert m.shared and m.state == "ready" and m.max_batch == 8
    acme, zorg = m.dedicated
    assert (acme.owner, acme.state, acme.spill_over, acme.eta_s) == ("acme", "ready", False, 0.0)
    assert (zorg.owner, zorg.state, zorg.spill_over, zorg.eta_s) == ("zorg", "backoff", True, 7.0 + 20.0)
    assert "SIGKILL" in zorg.reason
    assert not other.shared and other.state == "planned" and other.dedicated[0].owner == "acme"
    assert ModelRoute.model_validate_json(m.model_dump_json()) == m


def test_the_shared_ones_state_is_not_hidden_by_an_owned_one(tmp_path: Path) -> None:
    world = world_of(planned(tmp_path, {"acme": {"models": {"m": 1}}}, "m"))
    alive(world, "m@acme-0")
    world.units["m-0"].become("failed", 1.0, "its process has ended with status 1")
    (row,) = make_routes(world, 2.0, 2.0, 0)
    assert row.state == "failed" and row.dedicated[0].state == "ready"
    assert not status_of(world).ready


def test_an_owner_shares_again_as_soon_as_its_last_replica_leaves(tmp_path: Path) -> None:
    world = world_of(planned(tmp_path, {"acme": {"models": {"m": 1}}}, "m"))
    alive(world, "m-0", "m@acme-0")
    world.units["m@acme-0"].leaving = Leaving("no longer asked for")
    (row,) = make_routes(world, 2.0, 2.0, 0)
    assert [each.owner for each in row.dedicated] == ["acme"], "it answers still"
    world.units["m@acme-0"].become("draining", 2.0)
    (row,) = make_routes(world, 2.0, 2.0, 0)
    assert row.dedicated == []


def test_time_passing_for_an_owned_replica_is_no_news(tmp_path: Path) -> None:
    world = world_of(planned(tmp_path, {"acme": {"models": {"m": 1}}}, "m"))
    alive(world, "m-0")
    unit = world.units["m@acme-0"]
    unit.become("starting", 1.0)
    unit.started_at = 1.0
    first = make_routes(world, 2.0, 2.0, 0)
    assert not is_news(first, make_routes(world, 5.0, 5.0, 0))
    assert is_news(first, make_routes(world, 5.0, 25.0, 0)), "the estimate has moved"
    unit.become("warming", 5.0)
    assert is_news(first, make_routes(world, 5.0, 5.0, 0))


def test_the_status_has_a_row_for_each_owner(tmp_path: Path) -> None:
    dedicated = {"acme": {"models": {"m": 2}, "spill_over": True}}
    world = world_of(planned(tmp_path, dedicated, "m", "other"))
    alive(world, "m-0", "m@acme-1", "other-0")
    seen = status_of(world)
    assert [(one.id, one.owner, one.spill_over, one.state) for one in seen.models] == [
        ("m", None, False, "ready"), ("m", "acme", True, "ready"), ("other", None, False, "ready")
    ]  # fmt: skip
    assert [(unit.id, unit.owner) for unit in seen.models[1].replicas] == [
        ("m@acme-0", "acme"), ("m@acme-1", "acme")
    ]  # fmt: skip
    assert seen.devices[0].held_bytes == 4 * GIB and not seen.ready


def test_scaling_neither_counts_nor_touches_them(tmp_path: Path) -> None:
    plans = planned(
        tmp_path, {"acme": {"models": {"m": 1}}}, "m", models={"m": {"min_replicas": 1, "max_replicas": 3}}
    )
    assert {m: [unit.id for unit in units] for m, units in scalable(world_of(plans)).items()} == {
        "m": ["m-0"]
    }


async def test_waking_is_for_the_shared_ones(tmp_path: Path) -> None:
    world = world_of(planned(tmp_path, {"acme": {"models": {"other": 1}}}, "m"))
    alive(world, "other@acme-0")
    waiters = Waiters(world, now=lambda: 2.0, send=lambda _: None, changed=asyncio.Event)
    with pytest.raises(WakeRefusedError, match="no model 'other' is served"):
        await waiters.until_ready("other")
