"""`hearth keys`: make and list API keys."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engine.config import load
from engine.metering import keys

app = typer.Typer(help="API keys: make and list.", no_args_is_help=True)
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Folder for keys, state, logs, weights.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")] = "default", state_dir: StateDir = None
) -> None:
    """Make a key. It is shown this once; only its hash is kept."""
    key = keys.make_key()
    keys.add_key(load(state_dir=state_dir).keys_file, key, name=name)
    print(key)


@app.command(name="list")
def list_keys(state_dir: StateDir = None) -> None:
    """List the keys by their first characters."""
    table = Table("id", "begins with", "name", "made")
    for key in keys.read_keys(load(state_dir=state_dir).keys_file):
        table.add_row(
            key.id, key.prefix + "…", key.name, f"{datetime.fromtimestamp(key.created):%Y-%m-%d %H:%M}"
        )
    Console().print(table)
