"""How each kind of unit is started: the command line, the environment, the files it is handed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import __version__
from engine.config import ROOT, Config
from engine.runners.environment import runner_environment, visible_devices
from engine.runners.spec import RUNNER_MODULES
from engine.scheduler.launcher import LaunchError, Order
from engine.scheduler.plan import RunnerPlan, fingerprint
from engine.scheduler.statefile import write_atomically
from engine.scheduler.units import GatewayPlan, PreparationPlan, Progress

#: Sections of the configuration that a gateway is not told, so that a change of them does not restart it.
GATEWAY_NEEDS_NOT = {"api_key", "dedicated", "models", "profile", "scheduler", "scaling", "tiers", "weights"}


class Commands:
    """Orders for the launcher. Writes the files that a process is told to read."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._files = config.state_dir.expanduser().resolve() / "specs"

    def use(self, config: Config) -> None:
        """Starts what is started from now on with another configuration (of the same state folder)."""
        self._config = config

    def gateway_plans(self, config: Config | None = None) -> list[GatewayPlan]:
        """One plan a worker; of another configuration than the one in use where it is given."""
        config = config or self._config
        settings = _gateway_settings(config)
        count = config.gateway.workers
        return [
            GatewayPlan(
                id=f"gateway-{index}",
                fingerprint=fingerprint(settings, __version__),
                settings=self._files / "gateway.json",
                index=index,
                alone=count == 1,
            )
            for index in range(count)
        ]

    def preparation_plans(self, runners: list[RunnerPlan]) -> list[PreparationPlan]:
        """One plan for each set of weights; runners with one weights key share it."""
        plans: dict[str, PreparationPlan] = {}
        for runner in runners:
            if runner.preparation not in plans:
                plans[runner.preparation] = PreparationPlan(
                    id=runner.preparation,
                    fingerprint=fingerprint(runner.entry.model_dump(mode="json")),
                    entry=runner.entry,
                    serving_id=runner.model,
                )
        return list(plans.values())

    def runner(self, plan: RunnerPlan, model_dir: Path) -> Order:
        """Starts a runner on prepared weights.

        Raises:
            LaunchError: its spec cannot be written.
        """
        spec = plan.spec.model_copy(update={"model_dir": model_dir})
        file = self._files / f"{plan.id}.json"
        self._write(file, spec.model_dump(mode="json"), plan.id)
        # A killed predecessor cannot have removed its socket.
        spec.socket.unlink(missing_ok=True)
        return Order(
            unit=plan.id,
            argv=self.runner_argv(plan, file),
            environment=runner_environment(spec, os.environ),
            folder=ROOT,
            log=self._log(plan.id),
            gpus=visible_devices(spec.device),
        )

    def runner_argv(self, plan: RunnerPlan, spec_file: Path) -> list[str]:
        """The runner's command line."""
        return [sys.executable, "-m", RUNNER_MODULES[plan.spec.engine], "--spec", str(spec_file)]

    def gateway(self, plan: GatewayPlan, listener: int) -> Order:
        """Starts a gateway worker that accepts on the inherited socket ``listener`` (a file descriptor).

        Raises:
            LaunchError: its settings cannot be written.
        """
        self._write(plan.settings, _gateway_settings(self._config), plan.id)
        return Order(
            unit=plan.id,
            argv=self.gateway_argv(plan, listener),
            environment=_without_settings(os.environ),
            folder=ROOT,
            log=self._log(plan.id),
            pass_fds=(listener,),
        )

    def gateway_argv(self, plan: GatewayPlan, listener: int) -> list[str]:
        """The gateway worker's command line."""
        return [
            sys.executable, "-m", "engine.gateway", "--settings", str(plan.settings), "--fd", str(listener)
        ]  # fmt: skip

    def preparation(self, plan: PreparationPlan) -> Order:
        """Starts the preparation of a model's weights.

        Raises:
            LaunchError: its entry cannot be written.
        """
        entry = self._files / f"{plan.id}.json"
        self._write(entry, plan.entry.model_dump(mode="json"), plan.id)
        self.progress_file(plan).unlink(missing_ok=True)
        return Order(
            unit=plan.id,
            argv=self.preparation_argv(plan, entry),
            environment=_without_settings(os.environ),
            folder=ROOT,
            log=self._log(plan.id),
            output=self._output_file(plan),
        )

    def preparation_argv(self, plan: PreparationPlan, entry: Path) -> list[str]:
        """The preparation's command line."""
        argv = [sys.executable, "-m", "models.prepare", "--entry", str(entry)]
        argv += ["--weights", str(self._config.weights_dir), "--progress", str(self.progress_file(plan))]
        if self._config.weights.hub_endpoint:
            argv += ["--hub-endpoint", self._config.weights.hub_endpoint]
        return [*argv, "--offline"] if self._config.weights.offline else argv

    def progress_file(self, plan: PreparationPlan) -> Path:
        return self._files / f"{plan.id}.progress.json"

    def _output_file(self, plan: PreparationPlan) -> Path:
        return self._files / f"{plan.id}.out"

    def prepared_folder(self, plan: PreparationPlan) -> Path | None:
        """What an ended preparation printed last: the folder (or file) that the engine loads."""
        try:
            lines = self._output_file(plan).read_text(errors="replace").split("\n")
        except OSError:
            return None
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        path = Path(last)
        return path if last and path.exists() else None

    def progress(self, plan: PreparationPlan) -> Progress | None:
        """What a running preparation last said of itself."""
        try:
            data = json.loads(self.progress_file(plan).read_bytes())
            total = data.get("total")
            return Progress(
                stage=str(data["stage"]),
                done=float(data.get("done") or 0.0),
                total=float(total) if total is not None else None,
                unit=str(data.get("unit") or ""),
                message=str(data.get("message") or ""),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _log(self, unit: str) -> Path:
        return self._config.log_dir / f"{unit}.log"

    def _write(self, file: Path, content: Mapping[str, Any], unit: str) -> None:
        try:
            write_atomically(file, json.dumps(content, indent=1))
        except OSError as error:
            raise LaunchError(f"{unit} could not be started: {file} cannot be written: {error}") from error


def _gateway_settings(config: Config) -> dict[str, Any]:
    told = config.model_dump(mode="json", exclude=GATEWAY_NEEDS_NOT)
    # Relative to our working folder; the gateway's is another.
    told["state_dir"] = str(config.state_dir.expanduser().resolve())
    return {"config": told, "listen": {"host": config.host, "port": config.port}}


def _without_settings(base: Mapping[str, str]) -> dict[str, str]:
    """The environment less Hearth's own variables: what they said is in the settings file already."""
    return {key: value for key, value in base.items() if not key.startswith("HEARTH_")}
