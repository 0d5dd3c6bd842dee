"""`hearth serve`: the scheduler in the foreground; a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler

from rich.console import Console
from rich.live import Live

from engine.cli import tables
from engine.cli.examples import curl_lines
from engine.cli.profile import chosen_profile
from engine.config import Config
from engine.metering import keys, tenants
from engine.metering.database import DatabaseAwayError, DatabaseError
from engine.metering.lookup import AccessError, hint
from engine.metering.opening import opened
from engine.scheduler.changes import Reloaded
from engine.scheduler.plan import Entries
from engine.scheduler.service import ReloadError, Scheduler, SchedulerError
from engine.scheduler.status import ModelStatus, Status
from models.catalog import CatalogError, load_catalog
from models.profile import Profile

_LOOK_S = 0.25


def serve(config: Config, *, plain: bool = False, read: Callable[[], Config] | None = None) -> int:
    """Serves until stopped; the exit status (0 after a clean stop).

    Args:
        config: the configuration.
        plain: plain lines even on a terminal.
        read: reads the configuration anew, for a reload.
    """
    console = Console()
    _log_to_file(config)
    try:
        profile = chosen_profile(config)
        shown_key, warnings = asyncio.run(look_into_database(config))
        for warning in warnings:
            console.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
        scheduler = Scheduler(config, profile, load_catalog(), read=read and (lambda: _read_anew(read)))
        live = console.is_terminal and not plain
        screen = Screen(console, shown_key, live=live, given=config.api_key is not None)
        asyncio.run(run_on(scheduler, screen))
    except (CatalogError, SchedulerError, AccessError, DatabaseError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


def _read_anew(read: Callable[[], Config]) -> tuple[Config, Profile, Entries]:
    config = read()
    return config, chosen_profile(config), load_catalog()


def _log_to_file(config: Config) -> None:
    """The whole log goes to `scheduler.log`; the terminal, which tells it in other words, gets warnings."""
    config.log_dir.mkdir(parents=True, exist_ok=True)
    file = RotatingFileHandler(config.log_dir / "scheduler.log", maxBytes=10_000_000, backupCount=1)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[file, terminal],
    )


async def look_into_database(config: Config) -> tuple[str | None, list[str]]:
    """The key to show and what a person should know, also where the database is away for now.

    Raises:
        AccessError: the configured key cannot be one or was revoked, or an old keys.json cannot be read.
        DatabaseError: the database cannot be used, or is away at the first start: nobody would have a key.
    """
    try:
        return await first_key(config), await unknown_owners(config) if config.dedicated else []
    except DatabaseAwayError as error:
        if not config.keys_snapshot.exists():
            raise
        given = config.api_key.get_secret_value() if config.api_key is not None else None
        return given, [
            f"{error} Serving begins with the keys that were known before; requests are recorded in the "
            "local journal until the database is back."
        ]


async def first_key(config: Config) -> str | None:
    """The key to show: a new one at the first start, the configured one, else None (only a hash is kept).

    Raises:
        AccessError: the configured key cannot be one or was revoked, or an old keys.json cannot be read.
        DatabaseError: the database cannot be used.
    """
    async with opened(config) as database:
        if config.api_key is not None:
            given = config.api_key.get_secret_value()
            _, key = await keys.create(database, key=given, name="HEARTH_API_KEY")
            state = key.state(keys.now_ms())
            if state != "valid":
                raise AccessError(f"The configured api_key ({key.id}) is {state}. Take another one.")
            return given
        if await keys.list_keys(database):
            return None
        made, _ = await keys.create(database, name="first")
        return made


async def unknown_owners(config: Config) -> list[str]:
    """A sentence for each `[dedicated.NAME]` that names no tenant of the database: a slip, or one to be made.

    Raises:
        DatabaseError: the database cannot be used.
    """
    async with opened(config) as database:
        known = {name for tenant in await tenants.list_tenants(database) for name in (tenant.id, tenant.name)}
    return [
        f"[dedicated] {owner}: there is no tenant of this name or id, so nobody uses its replicas. "
        f"{hint(owner, known, 'tenants')}"
        for owner in config.dedicated
        if owner not in known
    ]


class Screen:
    """What a person sees of a serving scheduler."""

    def __init__(self, console: Console, key: str | None, *, live: bool, given: bool = False) -> None:
        """`given`: the key comes from the configuration, so a person has it already."""
        self.console = console
        self.key = key
        self.given = given
        self.began = time.monotonic()
        self.table = Live(console=console, refresh_per_second=4, transient=False) if live else None
        self._told: dict[str, str] = {}
        self._was_ready = False
        #: When the last reload began that is yet to be completed.
        self._reloaded: float | None = None

    def show(self, status: Status) -> None:
        """Brings the screen up to date; called a few times a second, prints only what is new."""
        if self.table is not None and not self._was_ready:
            if not self.table.is_started:
                self.table.start()
            self.table.update(tables.models(status))
        if self.table is None or self._was_ready:
            self._lines(status)
        if status.ready and not self._was_ready:
            self._told = {_name(model): model.state for model in status.models}
            self.close()
            self._was_ready = True
            self._welcome(status)
        if status.ready and self._reloaded is not None:
            self.say(f"The new configuration is in place after {time.monotonic() - self._reloaded:.0f} s.")
            self._reloaded = None

    def close(self) -> None:
        """Gives the terminal back."""
        if self.table is not None and self.table.is_started:
            self.table.stop()

    def part(self) -> None:
        """Shows a key made at this start that nobody has seen yet, since it cannot be shown later."""
        if self.key is not None and not self.given and not self._was_ready:
            self.say(f"key       {self.key}   (made at this first start; only its hash is kept)")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def reloaded(self, told: Reloaded | ReloadError) -> None:
        """Says what a reload did, or why it was refused."""
        if self.table is not None and self.table.is_started:
            self.table.stop()
        if isinstance(told, ReloadError):
            self.say(f"\nReload refused: {told}")
            return
        self.console.print()
        self.console.print(tables.changes(told))
        if not told.quiet and self._was_ready:
            self._reloaded = time.monotonic()

    def _lines(self, status: Status) -> None:
        for model in status.models:
            stage = model.progress.stage if model.progress else ""
            told = f"{model.state} {stage}"
            if self._told.get(_name(model), "").split() == told.split():
                continue
            self._told[_name(model)] = told
            note = tables.note(model)
            seconds = time.monotonic() - self.began
            self.say(f"{seconds:6.1f} s  {_name(model)}: {model.state}{f' ({note})' if note else ''}")

    def _welcome(self, status: Status) -> None:
        seconds = time.monotonic() - self.began
        asleep = f"; {status.asleep} sleep until they are asked for" if status.asleep else ""
        self.say(f"\nEvery model is warm after {seconds:.0f} s{asleep}.")
        self.say(f"base URL  {status.base_url}")
        if self.key is None:
            self.say("key       one made before; `hearth keys create` makes another")
        else:
            self.say(f"key       {self.key}{'' if self.given else '   (only its hash is kept: note it now)'}")
        self.say("")
        for category, line in curl_lines(
            ((m.category, m.id) for m in status.models if not m.owner),
            status.base_url,
            self.key or "YOUR_KEY",
        ):
            self.say(f"# {category}")
            self.say(line)
        self.say("\nCtrl-C drains and stops; twice stops at once.")


def _name(model: ModelStatus) -> str:
    return f"{model.id} of {model.owner}" if model.owner else model.id


async def run_on(scheduler: Scheduler, screen: Screen) -> None:
    """Runs the scheduler until it has stopped: SIGINT and SIGTERM stop it, SIGHUP reloads."""
    loop = asyncio.get_running_loop()
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        screen.close()
        if asked == 1:
            screen.say("\nDraining requests and stopping every runner; Ctrl-C again stops at once.")
        scheduler.request_stop(kill=asked > 1)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    reloads: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        # Refused or not, the screen is told by the scheduler.
        with contextlib.suppress(ReloadError):
            await scheduler.reload()

    def hang_up() -> None:
        task = asyncio.create_task(reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, hang_up)
    scheduler.on_reload = screen.reloaded
    running = asyncio.create_task(scheduler.run())
    try:
        while not running.done():
            if not asked:
                screen.show(scheduler.status())
            await asyncio.wait([running], timeout=_LOOK_S)
        await running
    finally:
        screen.close()
        screen.part()
    if asked:
        screen.say("Stopped; nothing is left running.")
