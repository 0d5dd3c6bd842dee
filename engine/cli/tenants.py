"""`hearth tenants`: who owns keys and pays for them."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.cli.store import AsJson, ConfigFile, StateDir, fail, shown_time, with_database

if TYPE_CHECKING:
    from engine.metering.tenants import Tenant

app = typer.Typer(help="Tenants: create, list, show, set-plan, close, open.", no_args_is_help=True)

WhichTenant = Annotated[str, typer.Argument(metavar="TENANT", help="A tenant's id or name.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name, unique.")],
    plan: Annotated[
        str | None, typer.Option(help="A plan's id or name; default: no price, no limits.")
    ] = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a tenant. `hearth keys create --tenant NAME` then gives it keys."""
    from engine.metering import tenants

    made = with_database(config, state_dir, lambda database: tenants.create(database, name, plan=plan))
    _tell([made], as_json, one=True)


@app.command(name="list")
def list_tenants(config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List all tenants."""
    from engine.metering import tenants

    _tell(with_database(config, state_dir, tenants.list_tenants), as_json)


@app.command()
def show(
    tenant: WhichTenant, config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """Show one tenant, its plan, and where it stands under that."""
    from engine.cli.terms import plan_rows, standing_data, standing_rows
    from engine.metering.callers import tenant_standing

    found, plan, standing = with_database(
        config, state_dir, lambda database: tenant_standing(database, tenant, int(time.time() * 1000))
    )
    if as_json:
        terms = None if plan is None else plan.model_dump(mode="json")
        data = {**found.model_dump(mode="json"), "plan": terms, "standing": standing_data(standing)}
        print(json.dumps(data, indent=2))
        return
    table = Table(show_header=False, box=None)
    table.add_row("id", found.id)
    table.add_row("name", found.name)
    table.add_row("made", f"{shown_time(found.created_at)} UTC")
    if found.closed_at is not None:
        table.add_row("closed", f"{shown_time(found.closed_at)} UTC: its keys are refused")
    table.add_row("plan", plan.name if plan else "none: requests cost nothing and have no limit")
    for name, text in [] if plan is None else plan_rows(plan):
        table.add_row(f"  {name}", text)
    for name, text in [] if standing is None else standing_rows(standing):
        table.add_row(name, text)
    if plan is not None and standing is None:
        table.add_row("used", "counted per key: `hearth keys show KEY`")
    Console().print(table)


@app.command(name="set-plan")
def set_plan(
    tenant: WhichTenant,
    plan: Annotated[str | None, typer.Argument(help="A plan's id or name.")] = None,
    none: Annotated[bool, typer.Option("--none", help="No plan: no price and no limits.")] = False,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Give a tenant another plan, for requests from now on."""
    from engine.metering import tenants

    if (plan is None) != none:
        fail("Name the plan, or give --none to take the tenant's away.")
    changed = with_database(config, state_dir, lambda database: tenants.set_plan(database, tenant, plan))
    _tell([changed], as_json, one=True)


@app.command()
def close(
    tenant: WhichTenant, config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """Refuse all of a tenant's keys, within a second; what it used stays in the ledger."""
    from engine.metering import tenants

    _tell([with_database(config, state_dir, lambda db: tenants.close(db, tenant))], as_json, one=True)


@app.command(name="open")
def reopen(
    tenant: WhichTenant, config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """Take a closed tenant's keys again."""
    from engine.metering import tenants

    _tell([with_database(config, state_dir, lambda db: tenants.reopen(db, tenant))], as_json, one=True)


def _tell(found: list[Tenant], as_json: bool, *, one: bool = False) -> None:
    if as_json:
        data = [each.model_dump(mode="json") for each in found]
        print(json.dumps(data[0] if one else data, indent=2))
        return
    table = Table("id", "name", "plan", "made (UTC)", "closed (UTC)", box=SIMPLE_HEAD)
    for column in table.columns[:2]:
        column.no_wrap = True
    for each in found:
        times = shown_time(each.created_at), shown_time(each.closed_at)
        table.add_row(each.id, each.name, each.plan_id or "none", *times)
    Console().print(table)
