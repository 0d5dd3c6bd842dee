"""A whole Hearth in a folder (a scheduler, its gateway workers, runners without models), and its killer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

from engine.config import ROOT, Config
from engine.routes import RouteTable
from engine.scheduler import groups
from engine.scheduler.leftovers import end_strays, scope_of, stop_leftovers
from engine.scheduler.statefile import StateFile, UnitRecord, load

_READY_S, _STOP_S = 60.0, 20.0


class HouseError(Exception):
    """Something ended or did not start that nobody killed; the message ends with its log's last lines."""


class House:
    """Started by `start`, killed in parts by its other methods, ended by `stop`."""

    def __init__(self, folder: Path, *, workers: int, database_url: str) -> None:
        """`folder` is there; `database_url` is '' for the SQLite file in its state folder."""
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.config = Config(
            port=self.port,
            state_dir=folder / "state",
            gateway={"workers": workers, "drain_s": 2.0, "access_log": False},
            scheduler={
                "health_interval_s": 0.5,
                "backoff_first_s": 0.05,
                "backoff_max_s": 0.2,
                "stop_timeout_s": 3.0,
                "drain_s": 3.0,
            },
            metering={"database_url": database_url},
        )
        self._scheduler: subprocess.Popen[bytes] | None = None
        self._file = folder / "config.json"

    @property
    def workers(self) -> int:
        return self.config.gateway.workers

    def begin(self) -> None:
        """Starts the scheduler, which starts or adopts the rest."""
        told = self.config.model_dump(mode="json", exclude={"api_key"})
        self._file.write_text(json.dumps(told))
        command = [sys.executable, "-m", "benchmarks.crash.serve", str(self._file)]
        with (self._folder / "scheduler.out").open("ab") as out:
            # Of its own session: a Ctrl-C in the terminal is for the benchmark, which ends it in order.
            self._scheduler = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True
            )

    async def ready(self) -> None:
        """Waits until every worker and runner is ready.

        Raises:
            HouseError: they are not in a minute, or the scheduler ended.
        """
        try:
            async with asyncio.timeout(_READY_S):
                while not (self._is_ready() and await asyncio.to_thread(self._answers)):
                    self.check()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise HouseError(f"not ready within {_READY_S:.0f} s:\n{self.last_words()}") from None

    async def serves(self, workers: int) -> None:
        """Waits until so many workers are past their start.

        Raises:
            HouseError: they are not in a minute, or the scheduler ended.
        """
        try:
            async with asyncio.timeout(_READY_S):
                while self.serving() < workers:
                    self.check()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise HouseError(f"fewer than {workers} workers serve:\n{self.last_words()}") from None

    def check(self) -> None:
        """
        Raises:
            HouseError: the scheduler ended by itself.
        """
        if self._scheduler is not None and self._scheduler.poll() is not None:
            raise HouseError(f"the scheduler ended by itself:\n{self.last_words()}")

    def gateways(self) -> list[UnitRecord]:
        """The gateway workers that live."""
        found = (unit for unit in self._state().units if unit.kind == "gateway")
        return [unit for unit in found if groups.lives(unit.process)]

    def serving(self) -> int:
        """How many gateway workers are past their start."""
        return sum(unit.state == "ready" for unit in self.gateways())

    def kill_gateway(self, chance: random.Random) -> bool:
        """SIGKILL to one living worker, also to one that is about to start; False: there is none."""
        living = self.gateways()
        if not living:
            return False
        return groups.signal_leader(chance.choice(living).process, signal.SIGKILL)

    def kill_scheduler(self) -> None:
        """SIGKILL; the workers and runners live on. `begin` starts the next one."""
        assert self._scheduler is not None
        self._scheduler.kill()
        self._scheduler.wait()
        self._scheduler = None

    def kill_everything(self) -> int:
        """SIGKILL to the scheduler and all workers; how many workers that were."""
        self.kill_scheduler()
        return sum(groups.signal_leader(unit.process, signal.SIGKILL) for unit in self.gateways())

    async def stop(self) -> None:
        """Ends all of it, whatever is left; in order where the scheduler lives."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        if self._scheduler is not None:
            self._scheduler.terminate()
            try:
                self._scheduler.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._scheduler.kill()
                self._scheduler.wait()
            self._scheduler = None
        stop_leftovers(self.config)
        end_strays(self.config, [])

    def left(self) -> list[int]:
        """Processes of this house that live."""
        scope = scope_of(self.config) + "/"
        return sorted(groups.with_token(lambda token: token.startswith(scope)))

    def last_words(self, lines: int = 25) -> str:
        """The ends of the logs of the scheduler and the workers."""
        files = [self._folder / "scheduler.out", *sorted(self.config.log_dir.glob("gateway-*.log"))]
        told = []
        for file in files:
            with contextlib.suppress(OSError):
                last = file.read_text(errors="replace").splitlines()[-lines:]
                told.append("\n".join([f"--- {file.name}", *last]))
        return "\n".join(told)

    def _state(self) -> StateFile:
        return load(self.config.state_file)

    def _is_ready(self) -> bool:
        try:
            table = RouteTable.model_validate_json(self.config.routes_file.read_bytes())
        except (OSError, ValueError):
            return False
        models = all(row.state == "ready" and row.replicas for row in table.models) and bool(table.models)
        return models and self.serving() == self.workers

    def _answers(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=2) as found:
                return bool(found.status == 200)
        except OSError:
            return False
