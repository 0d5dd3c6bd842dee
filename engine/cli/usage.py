"""`hearth usage`: what was used and charged, whether the books agree, and what becomes of old rows."""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.cli.store import AsJson, ConfigFile, StateDir, configuration, duration_ms, fail, with_database

if TYPE_CHECKING:
    from engine.metering.database import Database
    from engine.metering.moments import Span
    from engine.metering.usage import Asked, Line, Usage
    from engine.metering.verify import Report

app = typer.Typer(help="Usage: what was used and charged.", invoke_without_command=True)

By = Literal["day", "model", "category", "key", "tenant"]
#: Columns of the longest bar.
_BAR = 40


@dataclass(frozen=True)
class _Found:
    asked: Asked
    usage: Usage
    #: Names of keys and tenants by their ids.
    names: dict[str, str]


@app.callback()
def usage(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant: id or name.")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key: id, name or first 11 characters.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="From here: 2026-11-01, a time, or 30d (ago). Default: this month (UTC)."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Up to, and without, this date or time.")] = None,
    by: Annotated[By, typer.Option(help="What the lines are of.")] = "day",
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV, with amounts in whole units too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON: all sums at once.")] = False,
    chart: Annotated[bool, typer.Option("--chart", help="Bars of the number of requests.")] = False,
    config: ConfigFile = None,
    state_dir: StateDir = None,
) -> None:
    """Show what was used and charged; works while Hearth serves and when it does not."""
    if context.invoked_subcommand is not None:
        return
    from engine.metering.moments import shown_moment

    span = _span(since, until)
    found = with_database(config, state_dir, lambda database: _read(database, tenant, key, span, by, as_json))
    lines: list[Line] = getattr(found.usage, f"by_{by}")
    if as_json:
        whose = {"key": found.asked.key_id, "tenant": found.asked.tenant_id}
        times = {"since": shown_moment(span.since), "until": shown_moment(span.until)}
        print(json.dumps({"object": "usage", **times, **whose, **found.usage.document()}, indent=2))
    elif as_csv:
        _write_csv(lines, by, found.names)
    else:
        _show(found, lines, by, span, chart)


async def _read(
    database: Database, tenant: str | None, key: str | None, span: Span, by: By, everything: bool
) -> _Found:
    from engine.metering import keys, tenants
    from engine.metering.usage import asked_of, read_usage

    asked = await asked_of(database, tenant, key, span)
    owners = everything or by in ("key", "tenant")
    usage = await read_usage(database, asked, owners=owners)
    names: dict[str, str] = {}
    if owners:
        names = {each.id: each.name for each in await tenants.list_tenants(database)}
        names |= {each.id: each.name for each in await keys.list_keys(database)}
    return _Found(asked, usage, names)


def _span(since: str | None, until: str | None) -> Span:
    """The time that is meant; ends the command where it is none."""
    from engine.metering.moments import MomentError, parse_moment, span_of

    now = int(time.time() * 1000)

    def moment(text: str | None) -> int | None:
        if text is None:
            return None
        if re.fullmatch(r"\d+[smhdw]", text.strip()):
            return now - duration_ms(text)
        return parse_moment(text)

    try:
        return span_of(moment(since), moment(until), "month", now)
    except MomentError as error:
        fail(str(error))


def _show(found: _Found, lines: list[Line], by: By, span: Span, chart: bool) -> None:
    from engine.metering.moments import shown_moment
    from engine.metering.pricing import money_in

    console = Console()
    whose = [f"key {found.asked.key_id}"] if found.asked.key_id else []
    whose += [f"tenant {found.asked.tenant_id}"] if found.asked.tenant_id else []
    of = f" of {' and '.join(whose)}" if whose else ""
    begin, end = (shown_moment(at).removesuffix("T00:00:00Z") for at in (span.since, span.until))
    console.print(f"Usage{of} from {begin} up to {end} (UTC)", highlight=False, soft_wrap=True)
    if not lines:
        console.print("Nothing was answered in this time.", highlight=False)
        return
    table = Table(box=SIMPLE_HEAD, show_footer=True)
    table.add_column(by, "total", no_wrap=True, overflow="fold")
    if found.names:
        table.add_column("name", overflow="fold")
    total = found.usage.total
    requests = f"{sum(line.requests for line in total):,}"
    charges = [money_in(line.charge, line.unit) for line in total]
    # Numbers are never cut: a narrow terminal takes from the bars.
    for name, footer in (("requests", requests), ("charged", "\n".join(charges))):
        widest = max(len(name), *map(len, footer.splitlines()))
        table.add_column(name, footer, justify="right", no_wrap=True, min_width=widest)
    if chart:
        table.add_column("", min_width=10, max_width=_BAR)
    most = max(line.requests for line in lines)
    for line in lines:
        cells: list[Any] = [line.name, *([found.names.get(line.name, "")] if found.names else [])]
        cells += [f"{line.requests:,}", money_in(line.charge, line.unit)]
        if chart:
            cells.append(Bar(most, 0, line.requests))
        table.add_row(*cells)
    console.print(table)


def _write_csv(lines: Iterable[Line], by: By, names: dict[str, str]) -> None:
    """The charge as the ledger has it (cents), and as an amount (euros)."""
    from engine.metering.pricing import decimal

    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow([by, *(["name"] if names else []), "requests", "charge", "unit", "amount"])
    for line in lines:
        name = [names.get(line.name, "")] if names else []
        amount = decimal(line.charge, line.unit)
        out.writerow([line.name, *name, line.requests, line.charge, line.unit, amount])


@app.command()
def verify(config: ConfigFile = None, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Compare ledger, journals, gateways' counters and budgets; exit status 1 where something is wrong."""
    from engine.metering.verify import explain, gather

    folder = configuration(config, state_dir).ledger_dir
    report = explain(with_database(config, state_dir, lambda database: gather(database, folder)))
    if as_json:
        print(json.dumps(report.document(), indent=2))
    else:
        _tell(report, folder)
    raise typer.Exit(0 if report.good else 1)


def _tell(report: Report, folder: Path) -> None:
    console = Console()
    table = Table("", "requests", "charge (all units)", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    counted = f"{report.workers} gateway workers" if report.workers != 1 else "1 gateway worker"
    for name, sums in (
        ("in the ledger", report.ledger),
        ("in sums of old months", report.rolled),
        (f"on their way, in {folder}", report.waiting),
        (f"counted by {counted} since they began", report.counted),
    ):
        table.add_row(name, f"{sums.rows:,}", f"{sums.charge:,}")
    console.print(table)
    for finding in report.findings:
        word, style = ("WRONG", "red") if finding.wrong else ("explained", "yellow")
        console.print(word, style=style, end=" ")
        console.print(f"{finding.subject}: {finding.text}", highlight=False, markup=False, soft_wrap=True)
    console.print(report.summary(), style="green" if report.good else "red", highlight=False, soft_wrap=True)


@app.command(name="roll-up")
def roll_up(
    before: Annotated[
        str | None,
        typer.Option(help="Rows of all months before this one, as 2026-01. Default: metering.keep_months."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Replace the rows of old months by sums for each tenant, key and model, as gateways do daily."""
    from engine.metering import retention

    settings = configuration(config, state_dir)
    keep = settings.metering.keep_months
    month = before or retention.first_kept(keep, int(time.time() * 1000))
    if month is None:
        fail(
            "metering.keep_months is 0: all rows are kept. Name a month with --before to do it all the same."
        )

    async def work(database: Database) -> retention.Rolled:
        await retention.settle_journals(database, settings.ledger_dir)
        return await retention.roll_up(database, month, dry_run=dry_run)

    try:
        done = with_database(config, state_dir, work)
    except ValueError as error:
        fail(str(error))
    if as_json:
        print(json.dumps({**asdict(done), "rows": done.rows, "dry_run": dry_run}, indent=2))
        return
    verb = "would become" if dry_run else "became"
    for name, rows in done.months.items():
        print(f"{name}: {rows:,} rows {verb} sums")
    if done.kept:
        print(
            f"{sum(done.kept.values()):,} older rows stay: their gateway workers ({', '.join(done.kept)}) "
            "may still hold some of them in a journal. They go once those journals are in the ledger."
        )
    if done.busy:
        print("Another process is rolling up at this moment: the rest is left to it.")
    if not done.months and not done.kept:
        print(f"There are no rows from before {month}.")
