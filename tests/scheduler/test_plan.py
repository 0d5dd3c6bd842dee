"""Placement: what stands where, what its process is told, and what a person reads when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.scheduler.devices import Device, find_devices
from engine.scheduler.plan import SOCKET_PATH_BYTES, PlanError, make_plan, socket_path
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
    gpus = [Device("cpu:0", 64 * GIB), Device("cuda:0", 8 * GIB), Device("cuda:1", 8 * GIB)]
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
