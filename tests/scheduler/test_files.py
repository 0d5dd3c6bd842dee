"""The state file, the listening sockets and the commands."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from engine.scheduler.commands import Commands
from engine.scheduler.launcher import LOG_BYTES, LaunchError, LocalLauncher, Order, describe_exit
from engine.scheduler.leftovers import SchedulerError, make_runtime, sole_scheduler
from engine.scheduler.listener import ListenError, Listeners, reachable_host
from engine.scheduler.statefile import StateFile, StateWriter, boot_id, load
from engine.scheduler.units import Progress

from .support import config, entry, preparation_plan, runner_plans


def test_the_state_file_comes_back_whole_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "state" / "scheduler.json"
    state = StateFile(boot_id=boot_id(), port=7, durations={"a": 1.5})
    writer = StateWriter(file)
    writer.save(state)
    written = file.stat().st_mtime_ns
    writer.save(state)
    assert load(file) == state and file.stat().st_mtime_ns == written
    assert file.stat().st_mode & 0o777 == 0o600 and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}', '{"units": [{"id": "a"}]}'])
def test_a_state_file_that_cannot_be_read_is_no_state(tmp_path: Path, content: str) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(content)
    assert load(file).units == []


def test_processes_of_another_boot_are_forgotten_durations_are_not(tmp_path: Path) -> None:
    unit = {
        "id": "a",
        "kind": "runner",
        "pid": 1,
        "started": 1,
        "token": "t",
        "fingerprint": "f",
        "state": "ready",
    }
    old = StateFile.model_validate({"boot_id": "another", "units": [unit], "durations": {"a": 3.0}})
    (tmp_path / "s.json").write_text(old.model_dump_json())
    found = load(tmp_path / "s.json")
    assert found.units == [] and found.durations == {"a": 3.0}


def test_a_port_is_shared_by_our_workers_and_refused_to_others() -> None:
    ours, others = Listeners("127.0.0.1", 0), Listeners("127.0.0.1", 0)
    first = ours.open(0, shared=False)
    assert ours.open(0, shared=False) is first
    second = ours.open(1, shared=False)
    assert second.getsockname() == first.getsockname() == ("127.0.0.1", ours.port)
    others.port = ours.port
    with pytest.raises(ListenError, match=rf"port {ours.port} on 127.0.0.1 is taken by .*pid {os.getpid()}"):
        others.open(0, shared=False)
    ours.close()
    others.open(0, shared=False)
    others.close()


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ListenError, match="Check `host`"):
        Listeners("192.0.2.1", 0).open(0, shared=False)
    with pytest.raises(ListenError, match="is no address"):
        Listeners("no such host", 0).open(0, shared=False)


def test_hosts_as_clients_on_this_machine_write_them() -> None:
    hosts = ["0.0.0.0", "::", "::1", "127.0.0.1", "example.org"]
    assert [reachable_host(h) for h in hosts] == ["127.0.0.1", "[::1]", "[::1]", "127.0.0.1", "example.org"]


def test_gateways_are_told_all_but_the_key_and_where_the_state_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTH_API_KEY", "hearth-secret-0123456789")
    monkeypatch.chdir(tmp_path)
    commands = Commands(config(Path(), auth=False))
    (plan,) = commands.gateway_plans()
    order = commands.gateway(plan, 9)
    told = json.loads(plan.settings.read_text())["config"]
    assert told["state_dir"] == str(tmp_path / "state") and told["auth"] is False and "api_key" not in told
    assert not [name for name in order.environment if name.startswith("HEARTH_")]
    assert "hearth-secret" not in plan.settings.read_text() + str(order.argv) + str(order.environment)
    assert list(order.argv[1:]) == ["-m", "engine.gateway", "--settings", str(plan.settings), "--fd", "9"]
    assert order.pass_fds == (9,)


def test_the_gateway_reads_the_settings_that_it_is_given(tmp_path: Path) -> None:
    from engine.gateway.settings import read_settings

    settings = config(tmp_path, gateway={"workers": 2})
    commands = Commands(settings)
    commands.gateway(commands.gateway_plans()[0], 9)
    read = read_settings(commands.gateway_plans()[0].settings)
    assert read.gateway == settings.gateway and read.routes_file == settings.routes_file
    assert read.control_socket == settings.control_socket


def test_gateway_plans_change_with_their_settings_not_with_models(tmp_path: Path) -> None:
    def made(**fields: object) -> str:
        return Commands(config(tmp_path, **fields)).gateway_plans()[0].fingerprint

    assert made() == made(models={"a": {}}) != made(auth=False)
    assert [plan.id for plan in Commands(config(tmp_path, gateway={"workers": 2})).gateway_plans()] == [
        "gateway-0",
        "gateway-1",
    ]


def test_a_runner_is_told_its_spec_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.runners.spec import RunnerSpec

    monkeypatch.setenv("HEARTH_API_KEY", "hearth-secret-0123456789")
    (plan,) = runner_plans(tmp_path, entry("a"))
    order = Commands(config(tmp_path)).runner(plan, tmp_path / "weights")
    spec = RunnerSpec.model_validate_json(Path(order.argv[-1]).read_text())
    assert spec == plan.spec.model_copy(update={"model_dir": tmp_path / "weights"})
    assert list(order.argv[1:4]) == ["-m", "engine.runners.vllm_server", "--spec"]
    assert "hearth-secret" not in str(order.environment)


def test_a_preparation_is_offline_when_the_configuration_says_so(tmp_path: Path) -> None:
    (runner,) = runner_plans(tmp_path, entry("a"))
    plan = preparation_plan(runner)
    online = Commands(config(tmp_path, weights={"hub_endpoint": "http://mirror"})).preparation(plan)
    offline = Commands(config(tmp_path, weights={"offline": True})).preparation(plan)
    assert "--offline" not in online.argv and "--offline" in offline.argv
    assert list(online.argv[-2:]) == ["--hub-endpoint", "http://mirror"]


@pytest.mark.parametrize(
    ("content", "progress"),
    [
        ("{", None),
        ("{}", None),
        ('{"stage": "verify"}', Progress("verify", 0.0, None)),
        (
            '{"stage": "download", "done": 3, "total": 9, "unit": "bytes", "message": "m"}',
            Progress("download", 3.0, 9.0, "bytes", "m"),
        ),
    ],
)
def test_progress_is_read_as_far_as_it_can_be(
    tmp_path: Path, content: str, progress: Progress | None
) -> None:
    (runner,) = runner_plans(tmp_path, entry("a"))
    commands, plan = Commands(config(tmp_path)), preparation_plan(runner)
    assert commands.progress(plan) is None
    file = commands.progress_file(plan)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert commands.progress(plan) == progress


def test_a_program_that_is_not_there_is_a_launch_error(tmp_path: Path) -> None:
    order = Order("a-0", [str(tmp_path / "none")], {}, tmp_path, tmp_path / "logs" / "a-0.log")
    with pytest.raises(LaunchError, match="a-0 could not be started"):
        LocalLauncher("scope").launch(order)


def test_a_log_that_grows_is_set_aside_while_its_process_writes_on(tmp_path: Path) -> None:
    log = tmp_path / "a-0.log"
    launcher = LocalLauncher("scope")
    code = "import time\nfor i in range(400): print('word', i, flush=True); time.sleep(0.005)"
    ref = launcher.launch(Order("a-0", [sys.executable, "-S", "-c", code], {}, tmp_path, log))
    try:
        while log.stat().st_size < 100:
            time.sleep(0.005)
        with log.open("ab") as file:
            file.truncate(LOG_BYTES + 1)
        launcher.trim_logs()
        assert log.with_name("a-0.log.1").stat().st_size > LOG_BYTES
        while not launcher.log_tail("a-0"):
            time.sleep(0.005)
        assert all(line.startswith("word") for line in launcher.log_tail("a-0"))
        assert log.stat().st_size < 10_000
    finally:
        asyncio.run(launcher.sweep(ref, at_once=True))


def test_exit_statuses_for_a_person() -> None:
    assert describe_exit(3) == "its process has ended with status 3"
    assert "signal 11 (SIGSEGV)" in describe_exit(-11)
    assert "want of memory" in describe_exit(-9)
    assert describe_exit(None) == "its process has ended"


def test_a_runtime_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SchedulerError, match="is a link"):
        make_runtime(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(SchedulerError, match="cannot be made"):
        make_runtime(tmp_path / "file")
    make_runtime(tmp_path / "fresh")
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o700


def test_the_lock_is_let_go_of_at_the_end(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with sole_scheduler(settings):
        refused = pytest.raises(SchedulerError, match=f"process {os.getpid()}")
        with refused, sole_scheduler(settings):
            raise AssertionError("two hold it")
    with sole_scheduler(settings):
        pass


def test_a_listening_socket_takes_connections_before_its_worker_is_there() -> None:
    listeners = Listeners("127.0.0.1", 0)
    listeners.open(0, shared=False)
    with socket.create_connection(("127.0.0.1", listeners.port), timeout=2):
        pass
    listeners.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listeners.port), timeout=2)
