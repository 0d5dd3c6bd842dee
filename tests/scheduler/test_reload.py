"""A changed configuration over real processes: who stays, who is warm before who goes, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from typer.testing import CliRunner

from engine.cli.app import app
from engine.config import ROOT, Config, load
from engine.routes import RouteTable
from engine.scheduler import statefile as files
from engine.scheduler.changes import Reloaded
from engine.scheduler.probe import HttpProber
from engine.scheduler.service import ReloadError, Scheduler
from engine.scheduler.status import Status
from models.entry import ModelEntry

from .support import GIB, FakeCommands, catalog, config, entry, profile
from .test_processes import children, model, ours, ready, settings, until

__all__ = ["settings"]  # the fixture


class Node:
    """A scheduler whose configuration a test changes."""

    def __init__(self, settings: Config, *entries: ModelEntry) -> None:
        self.settings = settings
        self.entries = list(entries)
        self.fault: Exception | None = None
        commands, prober = FakeCommands(settings), HttpProber(health_timeout_s=2.0)
        self.scheduler = Scheduler(*self.read(), commands=commands, prober=prober, read=self.read)
        self.told: list[Reloaded | ReloadError] = []
        self.scheduler.on_reload = self.told.append

    def read(self) -> tuple[Config, Any, Any]:
        if self.fault:
            raise self.fault
        return self.settings, profile(*(one.id for one in self.entries)), catalog(*self.entries)

    def configure(self, **sections: dict[str, Any]) -> None:
        """Other values of some keys of some sections."""
        data = self.settings.model_dump()
        for section, values in sections.items():
            data[section] |= values
        self.settings = Config(**data)

    def table(self) -> RouteTable:
        return RouteTable.model_validate_json(self.settings.routes_file.read_bytes())

    def pids(self) -> dict[str, int | None]:
        status = self.scheduler.status()
        units = [*status.gateways, *(replica for one in status.models for replica in one.replicas)]
        return {unit.id: unit.pid for unit in units}


@contextlib.asynccontextmanager
async def serving(settings: Config, *entries: ModelEntry) -> AsyncIterator[Node]:
    node = Node(settings, *entries)
    task = asyncio.create_task(node.scheduler.run())
    try:
        await ready(node.scheduler)
        yield node
    finally:
        node.scheduler.request_stop()
        await asyncio.wait_for(task, 20)


@contextlib.asynccontextmanager
async def watched(node: Node, name: str = "m") -> AsyncIterator[list[set[str]]]:
    """Asks every replica that the route table names, all the time: each must answer. What it named."""
    seen: list[set[str]] = []

    async def ask() -> None:
        while True:
            row = next(row for row in node.table().models if row.id == name)
            ids = {replica.id for replica in row.replicas}
            if not seen or seen[-1] != ids:
                seen.append(ids)
            for replica in row.replicas:
                connector = aiohttp.UnixConnector(replica.socket or "")
                async with (
                    aiohttp.ClientSession(connector=connector) as session,
                    session.get("http://runner/health") as answer,
                ):
                    assert answer.status == 200
            await asyncio.sleep(0.005)

    asking = asyncio.create_task(ask())
    try:
        yield seen
        await asyncio.sleep(0.1)
    finally:
        if asking.done():
            asking.result()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


def is_only(*units: str) -> Callable[[Status], bool]:
    """All is ready and just these replicas are there."""
    return lambda status: status.ready and {r.id for m in status.models for r in m.replicas} == set(units)


async def test_the_new_replica_is_warm_before_the_old_one_goes(settings: Config) -> None:
    async with serving(settings, entry("m"), entry("n")) as node:
        before = node.pids()
        async with watched(node) as seen:
            node.entries[0] = entry("m", options={"x": 1})
            told = await node.scheduler.reload()
            assert [(c.kind, c.unit, c.reason) for c in told.changes] == [
                ("kept", "gateway-0", "unchanged"),
                ("changed", "m-1", "options.x: none → 1"),
                ("kept", "n-0", "unchanged"),
            ]
            await until(node.scheduler, is_only("m-1", "n-0"))
        assert seen == [{"m-0"}, {"m-1"}]
        after = node.pids()
        assert after["n-0"] == before["n-0"] and after["gateway-0"] == before["gateway-0"]
        assert not children(settings, "m-0") and node.told == [told]
        # Once more changes nothing.
        assert (await node.scheduler.reload()).quiet and node.pids() == after


async def test_a_dry_run_only_tells(settings: Config) -> None:
    async with serving(settings, entry("m")) as node:
        before = node.pids()
        node.entries = [entry("n")]
        told = await node.scheduler.reload(dry_run=True)
        assert told.dry_run and {c.unit: c.kind for c in told.changes if c.model != "gateway"} == {
            "n-0": "added",
            "m-0": "removed",
        }
        assert node.pids() == before and not node.told and (await ready(node.scheduler)).ready


async def test_models_come_and_go(settings: Config) -> None:
    async with serving(settings, entry("m"), entry("n")) as node:
        kept = node.pids()["n-0"]
        node.entries = [entry("k"), entry("n")]
        await node.scheduler.reload()
        await until(node.scheduler, is_only("k-0", "n-0"))
        assert [row.id for row in node.table().models] == ["k", "n"] and node.pids()["n-0"] == kept
        assert not children(settings, "m-0")


async def test_standing_scaling_and_timing_restart_nothing(settings: Config) -> None:
    async with serving(settings, entry("m")) as node:
        before = node.pids()
        models = {"m": {"priority": 7, "pinned": True, "max_replicas": 2}}
        node.configure(models=models, scaling={"up_after_s": 1.0}, scheduler={"health_interval_s": 0.2})
        told = await node.scheduler.reload()
        assert told.quiet and told.changes[1].reason.startswith("pinned: false → true; priority: 0 → 7")
        assert told.notes == ["scheduler.health_interval_s: 0.1 → 0.2", "scaling.up_after_s: 10 → 1"]
        assert node.pids() == before


async def test_where_memory_is_short_the_old_one_goes_first(tmp_path: Path, settings: Config) -> None:
    tight = settings.model_copy(
        update={"tiers": settings.tiers.model_copy(update={"cpu_memory_bytes": 3 * GIB})}
    )
    async with serving(tight, entry("m", memory_bytes=2 * GIB)) as node:
        node.entries = [entry("m", memory_bytes=2 * GIB, context_length=99)]
        told = await node.scheduler.reload()
        (change,) = (c for c in told.changes if c.model == "m")
        assert change.old_first and "m-0 ends first: no room for both" in change.reason
        await until(node.scheduler, is_only("m-1"))


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"tiers": {"cpu_memory_bytes": GIB // 2}}, 422, "m needs 1.0 GiB"),
        ({"models": {"nowhere": {}}}, 422, "model 'nowhere' is not in the catalog"),
        ({"weights": {"dir": "/elsewhere"}}, 409, "`weights.dir` cannot change while Hearth runs"),
        (
            {"metering": {"database_url": "postgresql://hearth:secret@db/hearth"}},
            409,
            r"`metering.database_url` cannot change while Hearth runs(?!.*secret)",
        ),
    ],
)
async def test_what_cannot_be_used_changes_nothing(
    settings: Config, change: dict[str, Any], status: int, reason: str
) -> None:
    async with serving(settings, entry("m")) as node:
        before = node.pids()
        node.configure(**change)
        with pytest.raises(ReloadError, match=reason) as refused:
            await node.scheduler.reload()
        assert refused.value.status == status and node.told == [refused.value]
        assert node.pids() == before and (await ready(node.scheduler)).ready


async def test_a_broken_file_changes_nothing_and_a_port_needs_a_restart(
    tmp_path: Path, settings: Config
) -> None:
    file = tmp_path / "hearth.toml"
    async with serving(settings, entry("m")) as node:
        before = node.pids()
        for text, said in (("port = ", "not valid TOML"), ("prot = 1", "unknown key 'prot'")):
            file.write_text(text)
            with pytest.raises(Exception, match=said) as error:
                load(file)
            node.fault = error.value
            with pytest.raises(ReloadError, match=f"nothing was changed: .*{said}"):
                await node.scheduler.reload()
        node.fault = None
        node.settings = node.settings.model_copy(update={"port": 1234})
        with pytest.raises(ReloadError, match=r"`port` cannot change .*\(0 → 1234\).* Restart"):
            await node.scheduler.reload()
        assert node.pids() == before


async def test_a_new_one_that_never_comes_up_leaves_the_old_one_serving(settings: Config) -> None:
    async with serving(settings, entry("m")) as node:
        good = node.pids()["m-0"]
        async with watched(node) as seen:
            node.entries = [entry("m", options={"exit": 3})]
            await node.scheduler.reload()
            await until(node.scheduler, lambda status: model(status).replicas[0].restarts >= 1)
            assert node.pids()["m-0"] == good
            # Another try with the same settings, then back.
            await node.scheduler.reload()
            node.entries = [entry("m")]
            told = await node.scheduler.reload()
            assert {c.unit: c.kind for c in told.changes if c.model == "m"} == {
                "m-0": "kept",
                "m-1": "removed",
            }
            await until(node.scheduler, is_only("m-0"))
        assert seen == [{"m-0"}] and node.pids()["m-0"] == good


async def test_an_old_one_that_dies_meanwhile_does_not_come_back(settings: Config) -> None:
    async with serving(settings, entry("m")) as node:
        node.entries = [entry("m", options={"exit": 3})]
        await node.scheduler.reload()
        os.kill(node.pids()["m-0"] or 0, signal.SIGKILL)
        await until(node.scheduler, lambda s: {r.id for r in model(s).replicas} == {"m-1"})
        node.entries = [entry("m")]
        await node.scheduler.reload()
        await until(node.scheduler, lambda s: s.ready and {r.id for r in model(s).replicas} != {"m-1"})


async def test_gateway_workers_are_renewed_one_after_the_other(tmp_path: Path) -> None:
    settings = config(tmp_path, gateway={"workers": 2})
    async with serving(settings, entry("m")) as node:
        before = node.pids()
        url = node.scheduler.status().base_url
        most, answers = 0, set()
        node.configure(gateway={"request_timeout_s": 5.0})
        told = await node.scheduler.reload()
        workers = [c for c in told.changes if c.model == "gateway"]
        assert {c.kind for c in workers} == {"restarted"}
        assert workers[0].reason == "gateway.request_timeout_s: 600 → 5"
        async with asyncio.timeout(20):
            while True:
                async with aiohttp.ClientSession() as session, session.get(url) as answer:
                    answers.add(int(await answer.text()))
                now = node.scheduler.status()
                most = max(most, sum(gateway.pid is not None for gateway in now.gateways))
                if now.ready and {g.id for g in now.gateways} == {"gateway-2", "gateway-3"}:
                    break
        after = node.pids()
        assert most == 3 and after["m-0"] == before["m-0"]
        assert not {before["gateway-0"], before["gateway-1"]} & set(ours(settings))
        node.configure(gateway={"workers": 1})
        await node.scheduler.reload()
        await until(node.scheduler, lambda s: s.ready and len(s.gateways) == 1)
        for _ in range(20):
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                assert int(await answer.text()) == node.scheduler.status().gateways[0].pid


async def test_the_control_socket_reloads(settings: Config) -> None:
    async with serving(settings, entry("m")) as node:
        connector = aiohttp.UnixConnector(str(settings.control_socket))
        async with aiohttp.ClientSession(connector=connector) as session:

            async def post(body: str) -> tuple[int, dict[str, Any]]:
                async with session.post("http://hearth/reload", data=body) as answer:
                    return answer.status, await answer.json()

            status, told = await post('{"dry_run": true}')
            assert status == 200 and told["dry_run"] and told["changes"][1]["kind"] == "kept"
            assert (await post(""))[0] == 200
            assert (await post('{"dry": 1}'))[0] == 400
            node.configure(models={"x": {}})
            status, told = await post("{}")
            assert status == 422 and "nothing was changed: model 'x'" in told["error"]["message"]
            node.settings = node.settings.model_copy(update={"models": {}, "host": "0.0.0.0"})
            assert (await post("{}"))[0] == 409


async def test_the_command_prints_the_changes_or_the_reason(settings: Config, tmp_path: Path) -> None:
    file = tmp_path / "hearth.toml"
    file.write_text(f'state_dir = "{settings.state_dir}"')

    async def hearth(*words: str) -> tuple[int, str]:
        argv = ["reload", "--config", str(file), *words]
        result = await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, argv)
        return result.exit_code, result.output

    code, text = await hearth()
    assert code == 1 and "Hearth does not run here" in text
    async with serving(settings, entry("m"), entry("n")) as node:
        node.entries[0] = entry("m", options={"x": 1})
        code, text = await hearth("--dry-run")
        assert code == 0 and "A reload would change: 1 changed, 2 kept" in text
        assert "m-0 → m-1" in text and "options.x: none → 1" in text and "m-1" not in node.pids()
        code, text = await hearth("--json")
        assert code == 0 and Reloaded.model_validate_json(text) == node.told[0]
        await until(node.scheduler, is_only("m-1", "n-0"))
        code, text = await hearth()
        assert code == 0 and "Reloaded, restarting nothing." in text
        node.configure(models={"x": {}})
        code, text = await hearth("--json")
        assert code == 1 and "model 'x' is not in the catalog" in json.loads(text)["reason"]
        file.write_text("prot = 1")
        code, text = await hearth()
        assert code == 1 and "nothing was changed" in text and "Did you mean 'port'?" in text


async def test_replicas_follow_what_gateways_report(settings: Config) -> None:
    models = {"m": {"max_replicas": 2}}
    scaling = {"up_after_s": 0.3, "down_after_s": 0.5, "target_in_flight": 0.5}
    busy = Config(**(settings.model_dump() | {"models": models, "scaling": scaling}))
    async with serving(busy, entry("m")) as node:
        first, pid = node.pids()["m-0"], node.pids()["gateway-0"]
        in_hand = 99
        connector = aiohttp.UnixConnector(str(settings.control_socket))

        async def report(session: aiohttp.ClientSession) -> None:
            while True:
                body = {"worker": pid, "version": node.table().version, "models": {"m": {"waiting": in_hand}}}
                async with session.post("http://hearth/usage", json=body) as answer:
                    assert answer.status == 200
                await asyncio.sleep(0.05)

        async with aiohttp.ClientSession(connector=connector) as session:
            reporting = asyncio.create_task(report(session))
            await until(node.scheduler, is_only("m-0", "m-1"))
            assert {replica.id for replica in node.table().models[0].replicas} == {"m-0", "m-1"}
            in_hand = 0
            await until(node.scheduler, is_only("m-0"))
            reporting.cancel()
        assert node.pids()["m-0"] == first


# With a scheduler in a process of its own.


def start(folder: Path, output: Any = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.scheduler.serve_fakes", str(folder)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=output)


def living(settings: Config) -> dict[str, tuple[int, str]]:
    """Process number and state of each runner in the state file."""
    return {u.id: (u.pid, u.state) for u in files.load(settings.state_file).units if u.kind == "runner"}


async def wait_for(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  files of another process tell of no event
            await asyncio.sleep(0.02)


def are_ready(settings: Config, *units: str) -> Callable[[], bool]:
    return lambda: (
        (found := living(settings)).keys() == set(units)
        and all(state == "ready" for _, state in found.values())
    )


async def test_hanging_up_reloads_and_the_console_tells_it(tmp_path: Path, settings: Config) -> None:
    models, output = tmp_path / "models.json", tmp_path / "output"
    models.write_text(json.dumps({"a": {}, "b": {}}))
    with output.open("wb") as out:
        process = start(tmp_path, out)
        try:
            await wait_for(are_ready(settings, "a-0", "b-0"))
            await wait_for(lambda: "Every model is warm" in output.read_text())
            kept = living(settings)["b-0"]
            models.write_text("{")
            process.send_signal(signal.SIGHUP)
            await wait_for(lambda: "Reload refused: nothing was changed" in output.read_text())
            models.write_text(json.dumps({"a": {"options": {"x": 1}}, "b": {}}))
            process.send_signal(signal.SIGHUP)
            await wait_for(are_ready(settings, "a-1", "b-0"))
            assert living(settings)["b-0"] == kept
            text = output.read_text()
            assert (
                "Reloaded: 1 changed, 2 kept" in text
                and "a-0 → a-1" in text
                and "options.x: none → 1" in text
            )
            await wait_for(lambda: "The new configuration is in place" in output.read_text())
        finally:
            process.terminate()
            assert process.wait(20) == 0


async def test_killed_in_mid_reload_the_next_start_ends_in_the_new_configuration(
    tmp_path: Path, settings: Config
) -> None:
    models, slow = tmp_path / "models.json", tmp_path / "slow"
    models.write_text(json.dumps({"a": {}, "b": {}}))
    process = start(tmp_path)
    try:
        await wait_for(are_ready(settings, "a-0", "b-0"))
        kept = living(settings)["b-0"]
        slow.touch()
        models.write_text(json.dumps({"a": {"options": {"hang_file": str(slow)}}, "b": {}}))
        process.send_signal(signal.SIGHUP)
        await wait_for(lambda: "a-1" in living(settings))
        assert living(settings)["a-0"][1] == "ready"
        process.kill()
        process.wait()
        half = living(settings)["a-1"][0]
        process = start(tmp_path)
        slow.unlink()
        await wait_for(are_ready(settings, "a-1", "b-0"))
        # What was half-way is taken over as well.
        assert living(settings)["b-0"] == kept and living(settings)["a-1"][0] == half
        assert not children(settings, "a-0")
    finally:
        process.terminate()
        assert process.wait(20) == 0
