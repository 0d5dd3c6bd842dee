"""`hearth plans`: what a request costs and how many there may be."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Sequence
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
    "A change is in force within a second, for requests from then on.",
    no_args_is_help=True,
)

WhichPlan = Annotated[str, typer.Argument(metavar="PLAN", help="A plan's id or name.")]
#: Amounts are read by `_whole`, which tells in words what cannot be one.
Amount = Annotated[str | None, typer.Option(metavar="N", help="One request, in the unit; default 0.")]
Prices = Annotated[
    list[str] | None, typer.Option(metavar="NAME=N", help="Another price: NAME=AMOUNT. Repeatable.")
]
Limit = Annotated[str | None, typer.Option(metavar="N", help="At least 1; 'none' = no limit.")]


def _terms(
    price: Amount = None,
    category: Prices = None,
    model: Prices = None,
    period: Annotated[
        str | None,
        typer.Option(help="'month' or 'day': when included requests and budget begin anew (UTC)."),
    ] = None,
    included: Annotated[
        str | None, typer.Option(metavar="N", help="First requests of each period that cost nothing.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="N", help="Most in a period, in --budget-of; 'none' = no bound.")
    ] = None,
    budget_of: Annotated[str | None, typer.Option(help="'charge' or 'requests'.")] = None,
    hard: Annotated[
        bool | None,
        typer.Option("--hard/--soft", help="Over the budget: refused (default), or served and told."),
    ] = None,
    counts: Annotated[
        str | None, typer.Option(help="'key' or 'tenant': whose requests count together.")
    ] = None,
    requests_per_minute: Limit = None,
    requests_per_day: Limit = None,
    concurrent: Limit = None,
    max_context: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Most tokens that a request may ask for, in and out; 'none' = no limit."
        ),
    ] = None,
    weight: Annotated[
        str | None, typer.Option(metavar="N", help="Share of a busy model against other keys', 1 to 1000.")
    ] = None,
) -> dict[str, Any]:
    """What was given of a plan's terms, by the names of the options."""
    return {name: value for name, value in locals().items() if value is not None}


def with_terms(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `_terms`, in the place of its parameter `given`."""
    own, terms = inspect.signature(command, eval_str=True), inspect.signature(_terms, eval_str=True)

    @functools.wraps(command)
    def whole(**arguments: Any) -> None:
        given = _terms(**{name: arguments.pop(name) for name in terms.parameters})
        command(**arguments, given=given)

    parameters = [
        parameter
        for name, each in own.parameters.items()
        for parameter in (terms.parameters.values() if name == "given" else (each,))
    ]
    # What Typer makes the options of.
    whole.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    whole.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return whole


@app.command()
@with_terms
def create(
    name: Annotated[str, typer.Argument(help="Its name, unique.")],
    given: dict[str, Any],
    currency: Annotated[
        str | None, typer.Option(help="ISO 4217, for instance EUR: amounts are cents. Default: credits.")
    ] = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a plan, for instance: hearth plans create team --currency EUR --price 2 --category image=10"""
    from engine.metering import planstore

    spec = _spec({}, given)
    unit = "credits" if currency is None else "minor"
    made = with_database(
        config,
        state_dir,
        lambda database: planstore.create(database, name, spec, unit=unit, currency=currency or ""),
    )
    _tell_one(made, as_json)


@app.command(name="set")
@with_terms
def change(
    plan: WhichPlan,
    given: dict[str, Any],
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Change what is given of a plan, for requests from now on (NAME=none takes a price away)."""
    from engine.metering import planstore

    old = with_database(config, state_dir, lambda database: planstore.find(database, plan))
    spec = _spec(old.spec.model_dump(mode="json"), given)
    _tell_one(
        with_database(config, state_dir, lambda database: planstore.change(database, old.id, spec)), as_json
    )


@app.command(name="list")
def list_plans(config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List all plans."""
    from engine.cli.terms import budget_of
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
        table.add_row(plan.id, plan.name, money(plan.spec.price, plan), included, budget_of(plan))
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


#: Terms that are whole numbers, and those of them that may be none.
_NUMBERS = ("price", "included", "weight")
_LIMITS = ("requests_per_minute", "requests_per_day", "concurrent", "max_context")


def _spec(old: dict[str, Any], given: dict[str, Any]) -> PlanSpec:
    """The terms `old` with what was given (as `_terms`) over them; ends the command when they cannot be."""
    from engine.metering.plans import PlanError, read_spec

    data = {**old}
    for name in ("period", "counts"):
        if name in given:
            data[name] = given[name]
    for name in (*_NUMBERS, *_LIMITS):
        if name in given:
            data[name] = _whole(name, given[name], may_be_none=name in _LIMITS)
    by_category, by_model = _prices("category", given.get("category")), _prices("model", given.get("model"))
    own_names = dict(zip(by_model, model_names(list(by_model)), strict=True))
    by_model = {own_names[name]: price for name, price in by_model.items()}
    for field, prices in (("categories", by_category), ("models", by_model)):
        merged = {**data.get(field, {}), **prices}
        data[field] = {name: price for name, price in merged.items() if price is not None}
    _set_budget(data, given)
    try:
        return read_spec(data)
    except PlanError as error:
        fail(f"The plan cannot be so: {error}.")


def _set_budget(data: dict[str, Any], given: dict[str, Any]) -> None:
    limit = given.get("budget")
    if limit == "none":
        data["budget"] = None
        return
    changed = {} if limit is None else {"limit": _whole("budget", limit)}
    changed |= {name: given[key] for name, key in (("of", "budget_of"), ("hard", "hard")) if key in given}
    if not changed:
        return
    data["budget"] = {**(data.get("budget") or {}), **changed}
    if "limit" not in data["budget"]:
        fail("A budget needs its limit: give --budget too.")


def _prices(kind: str, given: Sequence[str] | None) -> dict[str, int | None]:
    """NAME=AMOUNT pairs; None where one is taken away."""
    prices = {}
    for each in given or ():
        name, equals, amount = each.rpartition("=")
        if not equals or not name:
            fail(f"--{kind} {each}: write NAME=AMOUNT, for instance image=10.")
        prices[name] = _whole(f"--{kind} {name}", amount)
    return prices


def _whole(what: str, text: str, *, may_be_none: bool = True) -> int | None:
    if may_be_none and text == "none":
        return None
    if not re.fullmatch(r"-?[0-9]{1,40}", text):
        what, short = what.replace("_", " "), text if len(text) <= 40 else f"{text[:40]}…"
        or_none = ", or 'none'" if may_be_none else ""
        fail(f"{what} is '{short}': amounts are whole numbers (of cents, not euros){or_none}.")
    return int(text)


def _tell_one(plan: Plan, as_json: bool) -> None:
    from engine.cli.terms import plan_rows

    if as_json:
        print(plan.model_dump_json(indent=2))
        return
    table = Table(show_header=False, box=None)
    for row in (("id", plan.id), ("name", plan.name), *plan_rows(plan)):
        table.add_row(*row)
    Console().print(table)
