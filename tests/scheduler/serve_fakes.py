"""A scheduler of its own process, over fake runners: ``STATE_DIR MODEL…``. For tests that kill it."""

import asyncio
import signal
import sys
from pathlib import Path

from engine.scheduler.service import Scheduler
from tests.scheduler.support import FakeCommands, catalog, config, entry, profile


async def main() -> None:
    folder, *names = sys.argv[1:]
    settings = config(Path(folder))
    scheduler = Scheduler(
        settings, profile(*names), catalog(*map(entry, names)), commands=FakeCommands(settings)
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, scheduler.request_stop)
    await scheduler.run()


asyncio.run(main())
