"""`hearth keys`: make, list, show, rotate and revoke API keys."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.cli.store import (
    AsJson,
    ConfigFile,
    StateDir,
    duration_ms,
    fail,
    model_names,
    moment_ms,
    shown_time,
    with_database,
)

if TYPE_CHECKING:
    from engine.metering.database import Database
    from engine.metering.keyring import Caller
    from engine.metering.keys import Key

app = typer.Typer(help="API keys: create, list, show, rotate, revoke.", no_args_is_help=True)

WhichKey = Annotated[str, typer.Argument(metavar="KEY", help="A key's id, name or first 11 characters.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")] = "default",
    tenant: Annotated[str, typer.Option(help="Whose key it is: a tenant's id or name.")] = "default",
    plan: Annotated[str | None, typer.Option(help="A plan of its own; default: its tenant's.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it ends: 30d, 2027-01-31, 2027-01-31T12:00 (UTC).")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May use /admin/v1.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="Only this model. Repeatable.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this category. Repeatable.")] = None,
    address: Annotated[
        list[str] | None, typer.Option(help="Only from this address or network (10.0.0.0/8). Repeatable.")
    ] = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once; only its hash is kept."""
    from engine.cli.terms import in_short
    from engine.metering import keys
    from engine.metering.callers import caller_of
    from engine.metering.lookup import AccessError

    ends = None if expires is None else moment_ms(expires, keys.now_ms())
    try:
        allowed = keys.read_allowed(
            {
                "models": model_names(model or ()),
                "categories": tuple(category or ()),
                "addresses": tuple(address or ()),
            }
        )
    except AccessError as error:
        fail(str(error))

    async def make(database: Database) -> tuple[str, Caller]:
        text, key = await keys.create(
            database, name=name, tenant=tenant, plan=plan, expires_at=ends, admin=admin, allowed=allowed
        )
        return text, await caller_of(database, key)

    text, caller = with_database(config, state_dir, make)
    if as_json:
        print(json.dumps({"key": text, **_data(caller.key), "plan": _plan(caller)}, indent=2))
        return
    # Beside the key, which may go through a pipe.
    Console(stderr=True).print(in_short(caller), highlight=False, markup=False, soft_wrap=True)
    print(text)


@app.command(name="list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """List the keys by their first characters."""
    from engine.metering import keys

    found = with_database(config, state_dir, lambda database: keys.list_keys(database, tenant=tenant))
    if as_json:
        print(json.dumps([_data(key) for key in found], indent=2))
        return
    table = Table("id", "begins with", "name", "tenant", "state", "ends (UTC)", "may use", box=SIMPLE_HEAD)
    for column in table.columns[:3]:
        column.no_wrap = True
    now = _now_ms()
    for key in found:
        prefix = f"{key.prefix}…" if key.prefix else ""
        ends = shown_time(key.revoked_at or key.expires_at)
        table.add_row(key.id, prefix, key.name, key.tenant_id, key.state(now), ends, _may(key))
    Console().print(table)


@app.command()
def show(
    key: WhichKey, config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """Show all that is kept of a key, the plan that applies to it, and where it stands under that."""
    from engine.cli.terms import plan_rows, standing_data, standing_rows
    from engine.metering.callers import key_standing

    caller, standing = with_database(
        config, state_dir, lambda database: key_standing(database, key, _now_ms())
    )
    data = _data(caller.key)
    if as_json:
        print(json.dumps({**data, "plan": _plan(caller), "standing": standing_data(standing)}, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in data.items():
        text = shown_time(value) + " UTC" if name.endswith("_at") and value is not None else value
        if isinstance(value, dict):
            text = "; ".join(f"{what}: {', '.join(names)}" for what, names in value.items() if names) or "all"
        table.add_row(name, "" if text is None else str(text))
    if caller.plan is None:
        table.add_row("plan", "none: requests cost nothing and have no limit")
    else:
        whose = "the key's own" if caller.key.plan_id else f"that of its tenant, {caller.tenant.name}"
        table.add_row("plan", f"{caller.plan.name} ({whose})")
        for name, text in plan_rows(caller.plan):
            table.add_row(f"  {name}", text)
    for name, text in [] if standing is None else standing_rows(standing):
        table.add_row(name, text)
    Console().print(table)


@app.command()
def rotate(
    key: WhichKey,
    keep: Annotated[
        str, typer.Option(help="How long the old key stays good, for instance 24h; 0s = not at all.")
    ] = "24h",
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key with the same terms in place of one; the new one is shown this once."""
    from engine.metering import keys

    keep_ms = duration_ms(keep)
    text, new, old = with_database(
        config, state_dir, lambda database: keys.rotate(database, key, keep_ms=keep_ms)
    )
    if as_json:
        print(json.dumps({"key": text, **_data(new), "replaces": _data(old)}, indent=2))
        return
    until = "ended now" if old.revoked_at else f"ends {shown_time(old.expires_at)} UTC"
    Console(stderr=True).print(f"{old.id} {until}; in its place ({new.id}):", highlight=False, soft_wrap=True)
    print(text)


@app.command()
def revoke(
    key: WhichKey, config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """End a key for good; every gateway refuses it within a second."""
    from engine.metering import keys

    ended = with_database(config, state_dir, lambda database: keys.revoke(database, key))
    if as_json:
        print(json.dumps(_data(ended), indent=2))
    else:
        print(f"{ended.id} ({ended.name}) is revoked.")


def _data(key: Key) -> dict[str, Any]:
    """What is told of a key: all but its digest."""
    data = key.model_dump(mode="json", exclude={"sha256"})
    return {"id": data.pop("id"), "state": key.state(_now_ms()), **data}


def _plan(caller: Caller) -> dict[str, Any] | None:
    """The plan that applies, with all its terms."""
    return None if caller.plan is None else caller.plan.model_dump(mode="json")


def _may(key: Key) -> str:
    allowed = key.allowed
    limits = [*allowed.models, *allowed.categories, *allowed.addresses]
    return ", ".join([*(["admin"] if key.admin else []), *(limits or ["all"])])


def _now_ms() -> int:
    return int(time.time() * 1000)
