"""`hearth plans`: what a request costs and how many there may be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.cli.store import AsJson, ConfigFile, StateDir, fail, model_names, with_database

if TYPE_CHECKING:
    from engine.metering.plans import Plan, PlanSpec

app = typer.Typer(
    help="Plans: create, list, show, set, delete. Amounts are whole numbers (of cents, or credits). "
    "Kept and shown only, for now: the gateway does not yet charge or limit by them.",
    no_args_is_help=True,
)

WhichPlan = Annotated[str, typer.Argument(metavar="PLAN", help="A plan's id or name.")]
Price = Annotated[int | None, typer.Option(help="One request, in the unit; default 0.")]
Prices = Annotated[list[str] | None, typer.Option(help="Another price: NAME=AMOUNT. Repeatable.")]
Period = Annotated[
    str | None, typer.Option(help="'month' or 'day': when included requests and budget begin anew (UTC).")
]
Included = Annotated[int | None, typer.Option(help="First requests of each period that cost nothing.")]
BudgetLimit = Annotated[str | None, typer.Option(help="Most in a period, in --budget-of; 'none' = no bound.")]
BudgetOf = Annotated[str | None, typer.Option(help="'charge' or 'requests'.")]
Hard = Annotated[
    bool | None, typer.Option("--hard/--soft", help="Over the budget: refused (default), or served and told.")
]
Counts = Annotated[str | None, typer.Option(help="'key' or 'tenant': whose requests count together.")]
Limit = Annotated[str | None, typer.Option(help="At least 1; 'none' = no limit.")]
Weight = Annotated[int | None, typer.Option(help="Share of a busy model against other keys', 1 to 1000.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name, unique.")],
    currency: Annotated[
        str | None, typer.Option(help="ISO 4217, for instance EUR: amounts are cents. Default: credits.")
    ] = None,
    price: Price = None,
    category: Prices = None,
    model: Prices = None,
    period: Period = None,
    included: Included = None,
    budget: BudgetLimit = None,
    budget_of: BudgetOf = None,
    hard: Hard = None,
    counts: Counts = None,
    requests_per_minute: Limit = None,
    requests_per_day: Limit = None,
    concurrent: Limit = None,
    max_context: Limit = None,
    weight: Weight = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a plan, for instance: hearth plans create team --currency EUR --price 2 --category image=10"""
    from engine.metering import planstore

    given = {
        **_fields(price, period, included, counts, weight),
        **_limits(requests_per_minute, requests_per_day, concurrent, max_context),
    }
    spec = _spec({}, given, category, model, (budget, budget_of, hard))
    unit = "credits" if currency is None else "minor"
    made = with_database(
        config,
        state_dir,
        lambda database: planstore.create(database, name, spec, unit=unit, currency=currency or ""),
    )
    _tell_one(made, as_json)


@app.command(name="set")
def change(
    plan: WhichPlan,
    price: Price = None,
    category: Prices = None,
    model: Prices = None,
    period: Period = None,
    included: Included = None,
    budget: BudgetLimit = None,
    budget_of: BudgetOf = None,
    hard: Hard = None,
    counts: Counts = None,
    requests_per_minute: Limit = None,
    requests_per_day: Limit = None,
    concurrent: Limit = None,
    max_context: Limit = None,
    weight: Weight = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Change what is given of a plan, for requests from now on (NAME=none takes a price away)."""
    from engine.metering import planstore

    given = {
        **_fields(price, period, included, counts, weight),
        **_limits(requests_per_minute, requests_per_day, concurrent, max_context),
    }
    old = with_database(config, state_dir, lambda database: planstore.find(database, plan))
    spec = _spec(old.spec.model_dump(mode="json"), given, category, model, (budget, budget_of, hard))
    _tell_one(
        with_database(config, state_dir, lambda database: planstore.change(database, old.id, spec)), as_json
    )


@app.command(name="list")
def list_plans(config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List all plans."""
    from engine.metering import planstore
    from engine.metering.pricing import money

    found = with_database(config, state_dir, planstore.list_plans)
    if as_json:
        print(json.dumps([plan.model_dump(mode="json") for plan in found], indent=2))
        return
    table = Table("id", "name", "a request", "included", "budget", box=SIMPLE_HEAD)
    for column in table.columns[:2]:
        column.no_wrap = True
    for plan in found:
        included = f"{plan.spec.included} a {plan.spec.period}" if plan.spec.included else "none"
        table.add_row(plan.id, plan.name, money(plan.spec.price, plan), included, _budget(plan))
    Console().print(table)


@app.command()
def show(
    plan: WhichPlan, config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """Show all of a plan's terms."""
    from engine.metering import planstore

    _tell_one(with_database(config, state_dir, lambda database: planstore.find(database, plan)), as_json)


@app.command()
def delete(plan: WhichPlan, config: ConfigFile = None, state_dir: StateDir = None) -> None:
    """Remove a plan that nobody has."""
    from engine.metering import planstore

    gone = with_database(config, state_dir, lambda database: planstore.delete(database, plan))
    print(f"{gone.id} ({gone.name}) is removed.")


def _fields(
    price: int | None, period: str | None, included: int | None, counts: str | None, weight: int | None
) -> dict[str, Any]:
    """What was given of the fields that always have a value."""
    fields = {"price": price, "period": period, "included": included, "counts": counts, "weight": weight}
    return {name: value for name, value in fields.items() if value is not None}


def _limits(
    per_minute: str | None, per_day: str | None, concurrent: str | None, max_context: str | None
) -> dict[str, Any]:
    """What was given of the limits; None where one is taken away."""
    limits = {
        "requests_per_minute": per_minute,
        "requests_per_day": per_day,
        "concurrent": concurrent,
        "max_context": max_context,
    }
    return {name: _whole(name, value) for name, value in limits.items() if value is not None}


def _spec(
    old: dict[str, Any],
    given: dict[str, Any],
    categories: Sequence[str] | None,
    models: Sequence[str] | None,
    budget: tuple[str | None, str | None, bool | None],
) -> PlanSpec:
    """The terms `old` with what was given over them; ends the command when they cannot be."""
    from engine.metering.plans import PlanError, read_spec

    by_category, by_model = _prices("category", categories), _prices("model", models)
    own_names = dict(zip(by_model, model_names(list(by_model)), strict=True))
    by_model = {own_names[name]: price for name, price in by_model.items()}
    data = {**old, **given}
    for field, prices in (("categories", by_category), ("models", by_model)):
        merged = {**data.get(field, {}), **prices}
        data[field] = {name: price for name, price in merged.items() if price is not None}
    limit, of, hard = budget
    changed = {
        name: value
        for name, value in (("limit", limit and _whole("budget", limit)), ("of", of), ("hard", hard))
        if value is not None
    }
    if limit == "none":
        data["budget"] = None
    elif changed:
        data["budget"] = {**(data.get("budget") or {}), **changed}
        if "limit" not in data["budget"]:
            fail("A budget needs its limit: give --budget too.")
    try:
        return read_spec(data)
    except PlanError as error:
        fail(f"The plan cannot be so: {error}.")


def _prices(kind: str, given: Sequence[str] | None) -> dict[str, int | None]:
    """NAME=AMOUNT pairs; None where one is taken away."""
    prices = {}
    for each in given or ():
        name, equals, amount = each.rpartition("=")
        if not equals or not name:
            fail(f"--{kind} {each}: write NAME=AMOUNT, for instance image=10.")
        prices[name] = _whole(f"--{kind} {name}", amount)
    return prices


def _whole(what: str, text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        fail(f"{what} is '{text}': amounts are whole numbers (of cents, not euros), or 'none'.")


def _tell_one(plan: Plan, as_json: bool) -> None:
    from engine.metering.pricing import money

    if as_json:
        print(plan.model_dump_json(indent=2))
        return
    spec, table = plan.spec, Table(show_header=False, box=None)
    table.add_row("id", plan.id)
    table.add_row("name", plan.name)
    table.add_row("a request", money(spec.price, plan))
    for name, amount in [*spec.categories.items(), *spec.models.items()]:
        kind = "models" if name in spec.categories else ""
        table.add_row(f"  {name} {kind}".rstrip(), money(amount, plan))
    table.add_row("included", f"{spec.included} requests a {spec.period}" if spec.included else "none")
    table.add_row("budget", _budget(plan))
    table.add_row("counted", f"per {spec.counts}")
    for name in ("requests_per_minute", "requests_per_day", "concurrent", "max_context"):
        limit = getattr(spec, name)
        table.add_row(name.replace("_", " "), "no limit" if limit is None else str(limit))
    table.add_row("weight", str(spec.weight))
    Console().print(table)


def _budget(plan: Plan) -> str:
    from engine.metering.pricing import money

    budget = plan.spec.budget
    if budget is None:
        return "no bound"
    amount = f"{budget.limit} requests" if budget.of == "requests" else money(budget.limit, plan)
    return f"{amount} a {plan.spec.period}{'' if budget.hard else ', soft'}"
