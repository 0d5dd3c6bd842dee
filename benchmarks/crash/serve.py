"""A scheduler as `hearth serve` runs it, in a process of its own, but with runners that have no models.

`python -m benchmarks.crash.serve FILE`: FILE is the configuration as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

from rich.console import Console

from engine.cli.serve import Screen, run_on
from engine.config import Config
from engine.scheduler.commands import Commands
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.service import Scheduler
from engine.scheduler.units import PreparationPlan
from models.catalog import Catalog
from models.entry import LocalSource, ModelEntry
from models.profile import Profile, ProfileModel

MODEL = "crash-chat"
_RUNNER = Path(__file__).with_name("runner.py")
_MEMORY_BYTES = 1 << 20


class _Commands(Commands):
    """Gateway workers as ever; runners and preparations that need no engine."""

    def runner_argv(self, plan: RunnerPlan, spec_file: Path) -> list[str]:
        return [sys.executable, "-S", str(_RUNNER), "--spec", str(spec_file)]

    def preparation_argv(self, plan: PreparationPlan, entry: Path) -> list[str]:
        # Its last line names the prepared weights: any path that is there.
        return [sys.executable, "-S", "-c", f"print({str(_RUNNER)!r})"]


def make(config: Config) -> Scheduler:
    """The scheduler of one small chat model on two runners."""
    entry = ModelEntry(
        id=MODEL,
        category="chat",
        engine="vllm",
        sources=[LocalSource(kind="local", path=str(_RUNNER))],
        memory_bytes=_MEMORY_BYTES,
    )
    model = ProfileModel(id=MODEL, replicas=2, max_batch=64)
    profile = Profile(name="crash", models=[model])
    return Scheduler(config, profile, Catalog([entry]), commands=_Commands(config))


async def main(config: Config) -> None:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    await run_on(make(config), Screen(Console(width=200), None, live=False))


if __name__ == "__main__":
    asyncio.run(main(Config(**json.loads(Path(sys.argv[1]).read_text()))))
