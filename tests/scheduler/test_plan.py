"""Placement: what stands where, what its process is told, and what a person reads when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.scheduler.devices import Device, find_devices
from engine.scheduler.places import ASLEEP_BYTES
from engine.scheduler.plan import SOCKET_PATH_BYTES, PlanError, Standing, make_plan, socket_path
from models.profile import Needs

from .support import GIB, HOST, catalog, config, entry, profile


def test_budgets_and_settings_come_from_entry_then_profile_then_configuration(tmp_path: Path) -> None:
    known = catalog(entry("a", options={"x": 1, "args": {"p": 1, "q": 2}}, context_length=100, aliases=["A"]))
    wanted = profile("a", memory_bytes=2 * GIB, options={"args": {"q": 3}}, max_batch=4, threads=2)
    own = {"a": {"memory_bytes": 3 * GIB, "options": {"x": 5}, "max_wait_ms": 0.0, "context_length": 50}}
    (plan,) = make_plan(config(tmp_path, models=own), wanted, known, HOST)
    spec = plan.spec
    assert (spec.memory_bytes, spec.max_batch, spec.threads, spec.max_wait_ms) == (3 * GIB, 4, 2, 0.0)
    assert spec.options == {"x": 5, "args": {"p": 1, "q": 3}}
    assert (spec.context_length, spec.aliases, spec.device) == (50, ["A"], "cpu:0")


def test_what_does_not_fit_names_the_model_the_room_and_the_way_out(tmp_path: Path) -> None:
    known = catalog(entry("a", memory_bytes=2 * GIB), entry("big", memory_bytes=6 * GIB))
    with pytest.raises(PlanError) as caught:
        make_plan(config(tmp_path), profile("a", "big"), known, [Device("cpu:0", 8 * GIB)])
    assert str(caught.value).startswith("big needs 6.0 GiB; cpu:0 has 5.0 GiB of 7.0 GiB left after a. Lower")


def test_replicas_are_placed_one_by_one_on_the_first_gpu_with_room(tmp_path: Path) -> None:
    known = catalog(entry("a", memory_bytes=6 * GIB), entry("b", memory_bytes=2 * GIB))
    wanted = profile("a", "b").model_copy(update={"needs": Needs(gpus=2)})
    gpus = [Device("cpu:0", 64 * GIB), Device("cuda:0", 10 * GIB), Device("cuda:1", 10 * GIB)]
    plans = make_plan(config(tmp_path, models={"a": {"replicas": 2}}), wanted, known, gpus)
    assert [(plan.id, plan.device) for plan in plans] == [
        ("a-0", "cuda:0"),
        ("a-1", "cuda:1"),
        ("b-0", "cuda:0"),
    ]
    assert len({plan.spec.socket for plan in plans}) == 3


def test_a_gpu_profile_without_a_gpu_says_so(tmp_path: Path) -> None:
    wanted = profile("a").model_copy(update={"needs": Needs(gpus=1)})
    with pytest.raises(PlanError, match=r"needs 1 GPU.*HEARTH_PROFILE=tiny"):
        make_plan(config(tmp_path), wanted, catalog(entry("a")), HOST)


def test_a_cpu_profile_stays_on_the_cpu_of_a_gpu_machine(tmp_path: Path) -> None:
    devices = [*HOST, Device("cuda:0", 80 * GIB)]
    (plan,) = make_plan(config(tmp_path), profile("a"), catalog(entry("a")), devices)
    assert plan.device == "cpu:0"


def test_models_are_added_left_out_and_looked_up(tmp_path: Path) -> None:
    known = catalog(entry("a"), entry("b"), entry("extra"))
    own = {"extra": {}, "b": {"enabled": False}}
    plans = make_plan(config(tmp_path, models=own), profile("a", "b"), known, HOST)
    assert [plan.model for plan in plans] == ["a", "extra"]
    with pytest.raises(PlanError, match=r"model 'extre' is not in the catalog.*Did you mean extra"):
        make_plan(config(tmp_path, models={"extre": {}}), profile("a"), known, HOST)
    with pytest.raises(PlanError, match="no model left"):
        make_plan(config(tmp_path, models={"a": {"enabled": False}}), profile("a"), known, HOST)


def test_weights_of_ones_own_are_tried_first_and_shared_with_nobody(tmp_path: Path) -> None:
    known = catalog(entry("a", weights_key="k"), entry("b", weights_key="k"))
    plans = make_plan(config(tmp_path, models={"a": {"path": tmp_path}}), profile("a", "b"), known, HOST)
    assert [plan.preparation for plan in plans] == ["prepare-a-local", "prepare-k"]
    assert getattr(plans[0].entry.sources[0], "path", None) == str(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"context_length": 7}, {"options": {"a": 1}}, {"threads": 2}, {"path": "/elsewhere"}, {"max_queue": 3}],
)
def test_the_fingerprint_follows_all_that_a_process_is_told(
    tmp_path: Path, change: dict[str, object]
) -> None:
    known = catalog(entry("a"))
    (plain,) = make_plan(config(tmp_path), profile("a"), known, HOST)
    (again,) = make_plan(config(tmp_path), profile("a"), known, HOST)
    (changed,) = make_plan(config(tmp_path, models={"a": change}), profile("a"), known, HOST)
    assert plain.fingerprint == again.fingerprint != changed.fingerprint


def test_long_names_get_short_sockets_and_too_long_folders_an_error() -> None:
    folder = Path("/tmp/hearth-1000-0123456789")
    assert socket_path(folder, "a-0") == folder / "a-0.sock"
    long = socket_path(folder, "a" * 120)
    assert len(bytes(long)) <= SOCKET_PATH_BYTES and long != socket_path(folder, "a" * 121)
    with pytest.raises(PlanError, match="XDG_RUNTIME_DIR"):
        socket_path(Path("/" + "x" * 100), "a-0")


def test_this_machine_has_a_host_with_memory() -> None:
    host = find_devices()[0]
    assert host.name == "cpu:0" and not host.is_gpu and host.memory_bytes > GIB // 2


def test_standby_replicas_share_what_residents_leave(tmp_path: Path) -> None:
    image = {"category": "image", "engine": "diffusers", "memory_bytes": 3 * GIB}
    known = catalog(entry("chat", memory_bytes=2 * GIB), entry("x", **image), entry("y", **image))
    own = {name: {"tier": "standby", "pinned": True, "priority": 3} for name in ("x", "y")}
    room = 2 * GIB + 2 * ASLEEP_BYTES["diffusers"] + (3 * GIB - ASLEEP_BYTES["diffusers"])
    wanted = profile("x", "y", "chat")
    plans = make_plan(config(tmp_path, models=own), wanted, known, [Device("cpu:0", room + GIB)])
    assert [plan.id for plan in plans] == ["x-0", "y-0", "chat-0"]
    assert [(p.awake_bytes, p.asleep_bytes, p.spec.can_sleep) for p in plans] == [
        (3 * GIB, ASLEEP_BYTES["diffusers"], True),
        (3 * GIB, ASLEEP_BYTES["diffusers"], True),
        (2 * GIB, 0, False),
    ]
    assert plans[0].standing == Standing(tier="standby", pinned=True, priority=3)
    with pytest.raises(PlanError, match=r"^y needs 3\.0 GiB awake; cpu:0 has .* left after chat, x\."):
        make_plan(config(tmp_path, models=own), wanted, known, [Device("cpu:0", room + GIB - 1)])
    # The configured budget counts instead of the machine's memory.
    tight = config(tmp_path, models=own, tiers={"cpu_memory_bytes": room - 1})
    with pytest.raises(PlanError, match="y needs"):
        make_plan(tight, wanted, known, HOST)


def test_a_resident_is_told_that_standby_would_do_only_where_it_is_true(tmp_path: Path) -> None:
    image = {"category": "image", "engine": "diffusers", "memory_bytes": 3 * GIB}
    known = catalog(entry("x", **image), entry("y", **image))
    devices = [Device("cpu:0", 6 * GIB)]
    told = r'`tier = "standby"` in {} would make it fit; or lower `memory_bytes`'
    with pytest.raises(PlanError, match="x needs.*" + told.format(r"\[models\.y\]")):
        make_plan(config(tmp_path, models={"x": {"tier": "standby"}}), profile("x", "y"), known, devices)
    with pytest.raises(PlanError, match="y needs.*" + told.format(r"\[models\.y\] and \[models\.x\]")):
        make_plan(config(tmp_path), profile("x", "y"), known, devices)
    both = {name: {"tier": "standby"} for name in ("x", "y")}
    assert len(make_plan(config(tmp_path, models=both), profile("x", "y"), known, devices)) == 2
    with pytest.raises(PlanError, match=r"left after x\. Lower `memory_bytes`"):
        make_plan(config(tmp_path), profile("x", "y"), known, [Device("cpu:0", 4 * GIB)])


def test_vllm_cannot_be_standby_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a: vllm has no sleep mode on a CPU.*Make it resident"):
        make_plan(
            config(tmp_path, models={"a": {"tier": "standby"}}), profile("a"), catalog(entry("a")), HOST
        )


def test_ranks_of_one_replica_share_the_host(tmp_path: Path) -> None:
    (plan,) = make_plan(config(tmp_path), profile("a", ranks=2), catalog(entry("a")), HOST)
    assert (plan.device, plan.spec.device, plan.devices) == ("cpu:0,1", "cpu:0,1", ("cpu:0",))
    other = catalog(entry("a", engine="faster-whisper", category="audio"))
    with pytest.raises(PlanError, match="ranks = 2, but faster-whisper runs a replica in one process"):
        make_plan(config(tmp_path), profile("a", ranks=2), other, HOST)


@pytest.mark.parametrize(
    ("listed", "own", "bounds"),
    [
        ({}, {}, (1, 1)),
        ({"replicas": 2}, {}, (2, 2)),
        ({"replicas": 2, "max_replicas": 4}, {}, (2, 4)),
        ({"replicas": 2, "max_replicas": 4}, {"replicas": 3}, (3, 3)),
        ({"replicas": 2, "max_replicas": 4}, {"max_replicas": 1}, (1, 1)),
        ({"replicas": 2}, {"min_replicas": 3}, (3, 3)),
        ({}, {"min_replicas": 1, "max_replicas": 3}, (1, 3)),
    ],
)
def test_the_fewest_replicas_are_started_and_the_most_remembered(
    tmp_path: Path, listed: dict[str, int], own: dict[str, int], bounds: tuple[int, int]
) -> None:
    settings = config(tmp_path, models={"a": own})
    plans = make_plan(settings, profile("a", **listed), catalog(entry("a")), HOST)
    assert len(plans) == bounds[0]
    assert {(p.standing.min_replicas, p.standing.max_replicas) for p in plans} == {bounds}


def test_bounds_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    own = {"a": {"min_replicas": 3, "max_replicas": 2}}
    with pytest.raises(PlanError, match="min_replicas = 3 is more than max_replicas = 2"):
        make_plan(config(tmp_path, models=own), profile("a"), catalog(entry("a")), HOST)
