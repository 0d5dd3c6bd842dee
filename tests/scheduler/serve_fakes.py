"""A scheduler of its own process, over fake runners: ``STATE_DIR MODEL…``. For tests that kill it.

Models whose names begin with ``nap`` sleep until they are asked for; STATE_DIR/slow keeps them from waking.
``STATE_DIR/models.json``, where there is one, says instead which models there are, each with the fields of
its entry; SIGHUP reads it again.
"""

import asyncio
import json
import sys
from pathlib import Path

from rich.console import Console

from engine.cli.serve import Screen, run_on
from engine.config import Config, ConfigError
from engine.scheduler.service import Scheduler
from models.catalog import Catalog
from models.profile import Profile
from tests.scheduler.support import FakeCommands, catalog, config, entry, nap_config, napper, profile


def read(folder: Path, names: list[str]) -> tuple[Config, Profile, Catalog]:
    file = folder / "models.json"
    if file.exists():
        try:
            given = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file} is not valid: {error}") from error
        return config(folder), profile(*given), catalog(*(entry(name, **given[name]) for name in given))
    if all(name.startswith("nap") for name in names):
        entries = [napper(name, options={"slow_file": str(folder / "slow")}) for name in names]
        return nap_config(folder, *names), profile(*names), catalog(*entries)
    return config(folder), profile(*names), catalog(*map(entry, names))


async def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    settings, which, entries = read(folder, names)
    scheduler = Scheduler(
        settings, which, entries, commands=FakeCommands(settings), read=lambda: read(folder, names)
    )
    await run_on(scheduler, Screen(Console(width=200), None, live=False))


asyncio.run(main())
