"""The commands: thin, each calls the part that does the work."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from engine import __version__
from engine.cli import control, doctor, keys, models, moe, plan, plans, tables, tenants, usage
from engine.config import Config, ConfigError, load

app = typer.Typer(
    help="Hearth: every model warm behind one OpenAI-format endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")
app.add_typer(plans.app, name="plans")
app.add_typer(usage.app, name="usage")
app.command()(plan.plan)
app.add_typer(models.app, name="models")
app.add_typer(moe.app, name="moe")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="HEARTH_CONFIG", help="Configuration file; default: hearth.toml."),
]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Folder for keys, state, logs, weights.")]


def configuration(file: Path | None, **overrides: object) -> Config:
    """The configuration, or a clear end of the command."""
    try:
        return load(file, **overrides)
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Prints the message for a person and ends with status 1."""
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)


@app.command()
def serve(
    config: ConfigFile = None,
    state_dir: StateDir = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; default 8000, 0 = any free one.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile of models/profiles/; default: the largest that fits.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines even on a terminal.")] = False,
) -> None:
    """Warm every model of the profile and serve until Ctrl-C (twice: at once)."""
    from engine.cli.serve import serve as run

    def read() -> Config:
        return load(config, host=host, port=port, profile=profile, state_dir=state_dir)

    try:
        settings = read()
    except ConfigError as error:
        fail(str(error))
    raise typer.Exit(run(settings, plain=plain, read=read))


@app.command()
def status(
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole status as JSON.")] = False,
) -> None:
    """Show what runs, in which state and why. Exit status 1 when nothing is served."""
    settings = configuration(config, state_dir=state_dir)
    try:
        found = asyncio.run(control.status(settings))
    except control.NotRunningError as error:
        if as_json:
            print(json.dumps({"running": False, "reason": str(error)}))
            raise typer.Exit(1) from None
        fail(str(error))
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        Console().print(tables.full(found))


@app.command()
def reload(
    config: ConfigFile = None,
    state_dir: StateDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would change.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The changes, or the reason, as JSON.")] = False,
) -> None:
    """Go over to a changed configuration without a pause (as SIGHUP does). Exit status 1 when refused."""
    try:
        settings = load(config, state_dir=state_dir)
        told = asyncio.run(control.reload(settings, dry_run=dry_run))
    except (ConfigError, control.NotRunningError, control.RefusedError) as error:
        reason = f"nothing was changed: {error}" if isinstance(error, ConfigError) else str(error)
        if as_json:
            print(json.dumps({"refused": True, "reason": reason}))
            raise typer.Exit(1) from None
        fail(reason)
    if as_json:
        print(told.model_dump_json(indent=2))
    else:
        Console().print(tables.changes(told))


@app.command()
def stop(
    config: ConfigFile = None,
    state_dir: StateDir = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for requests in flight.")] = False,
) -> None:
    """Drain and stop everything, also what a killed scheduler left behind."""
    settings = configuration(config, state_dir=state_dir)
    for line in asyncio.run(control.stop(settings, drain=not now)):
        print(line)


@app.command()
def logs(
    model: Annotated[str, typer.Argument(help="A model's name, or 'gateway'.")],
    config: ConfigFile = None,
    state_dir: StateDir = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing as it grows.")] = False,
) -> None:
    """Print the end of a runner's log."""
    from engine.errors import nearest

    settings = configuration(config, state_dir=state_dir)
    known = {file.stem: file for file in sorted(settings.log_dir.glob("*.log"))}
    chosen = [known[name] for name in known if name == model or name.startswith((f"{model}-", f"{model}."))]
    if not chosen:
        close = nearest(model, known)
        there = (
            f"Did you mean {' or '.join(close)}?"
            if close
            else f"There are: {', '.join(known) or 'none yet'}."
        )
        fail(f"No log of '{model}' in {settings.log_dir}. {there}")
    for file in chosen:
        if len(chosen) > 1:
            print(f"==> {file.name} <==")
        with file.open(errors="replace") as text:
            sys.stdout.writelines(deque(text, maxlen=lines))
    if follow:
        _follow(chosen[-1])


def _follow(file: Path) -> None:
    try:
        with file.open(errors="replace") as text:
            text.seek(0, 2)
            while True:
                line = text.readline()
                if line:
                    print(line, end="", flush=True)
                elif file.stat().st_size < text.tell():  # begun anew by a restart
                    text.seek(0)
                else:
                    time.sleep(0.3)
    except KeyboardInterrupt:
        return


@app.command(name="doctor")
def doctor_command(config: ConfigFile = None, state_dir: StateDir = None) -> None:
    """Check what this machine has and say how to get what is missing. Exit status 1 on a fault."""
    settings = configuration(config, state_dir=state_dir)
    checks = doctor.examine(settings)
    Console().print(tables.checks(checks))
    raise typer.Exit(1 if any(check.state == "missing" for check in checks) else 0)


@app.command()
def version() -> None:
    """Print the versions of Hearth and its engines."""
    print(f"hearth {__version__}")
    for name, found in doctor.engine_versions().items():
        print(f"  {name} {found or 'not installed'}")
