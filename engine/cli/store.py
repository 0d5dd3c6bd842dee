"""What the commands on keys, tenants and plans share: the database, times, names, how failures are told.

SQLAlchemy takes 0.2 s to import, so it comes with the command that needs it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from engine.config import Config, ConfigError, load

if TYPE_CHECKING:
    from engine.metering.database import Database

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="HEARTH_CONFIG", help="Configuration file; default: hearth.toml."),
]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Folder for keys, state, logs, weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]

_T = TypeVar("_T")
_UNITS_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
#: The longest that a duration may be: no time beyond the year 9999 comes of it.
_LONGEST_MS = 1000 * 366 * 86_400_000


def with_database(
    config: Path | None, state_dir: Path | None, work: Callable[[Database], Awaitable[_T]]
) -> _T:
    """What `work` gives on the configured database, or a clear end of the command."""
    from engine.metering.database import DatabaseError
    from engine.metering.lookup import AccessError
    from engine.metering.opening import opened

    settings = configuration(config, state_dir)

    async def run() -> _T:
        async with opened(settings) as database:
            return await work(database)

    try:
        return asyncio.run(run())
    except (AccessError, DatabaseError) as error:
        fail(str(error))


def configuration(file: Path | None, state_dir: Path | None) -> Config:
    """The configuration, or a clear end of the command."""
    try:
        return load(file, state_dir=state_dir)
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Prints the message for a person and ends with status 1."""
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)


def duration_ms(text: str) -> int:
    """Milliseconds of '90s', '15m', '24h', '30d', '2w'; ends the command at anything else."""
    found = re.fullmatch(r"(\d{1,12})([smhdw])", text.strip())
    length = int(found[1]) * _UNITS_MS[found[2]] if found else -1
    if not 0 <= length <= _LONGEST_MS:
        fail(f"'{text}' is no duration: write for instance 90s, 15m, 24h, 30d or 2w (at most 1000 years).")
    return length


def moment_ms(text: str, now_ms: int) -> int:
    """Unix milliseconds of a duration from now, a date (its beginning, UTC), or a date and time."""
    if re.fullmatch(r"\d+[smhdw]", text.strip()):
        return now_ms + duration_ms(text)
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        fail(f"'{text}' is no time: write for instance 30d, 2027-01-31 or 2027-01-31T12:00.")
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


def shown_time(ms: int | None) -> str:
    """A time for a person, in UTC."""
    if ms is None:
        return ""
    return f"{datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms):%Y-%m-%d %H:%M}"


def model_names(names: Sequence[str]) -> tuple[str, ...]:
    """Models by their own names; an alias becomes that, an unknown one is kept with a word of warning."""
    if not names:
        return ()
    from models.catalog import CatalogError, load_catalog

    try:
        catalog = load_catalog()
    except CatalogError as error:
        fail(str(error))
    found = []
    for name in names:
        try:
            found.append(catalog.find(name).id)
        except CatalogError as error:
            Console(stderr=True).print(
                f"Kept as written, but: {error}",
                style="yellow",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            found.append(name)
    return tuple(found)
