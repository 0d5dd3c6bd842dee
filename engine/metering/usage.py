"""What was used: totals by day, model and category, and what becomes of old rows.

Days and months are UTC. Old months are rolled up: their rows are replaced by sums for each tenant, key, model
and category, in one transaction, so that a total is the same before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, literal, select, union_all
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database

_DAY_MS = 86_400_000


@dataclass(frozen=True)
class Asked:
    """Whose usage, and of when: Unix milliseconds, `since` included, `until` not. None does not restrict."""

    key_id: str | None = None
    tenant_id: str | None = None
    since: int | None = None
    until: int | None = None


@dataclass(frozen=True)
class Line:
    """Requests and what they were charged, in `unit`: charges of two units are never added."""

    name: str
    unit: str
    requests: int
    charge: int


@dataclass(frozen=True)
class Usage:
    """Sums over the same requests. A rolled-up month has no days: by_day shows it as "2026-11"."""

    total: list[Line]
    by_day: list[Line]
    by_model: list[Line]
    by_category: list[Line]
    #: By their ids; None unless they were asked for.
    by_tenant: list[Line] | None = None
    by_key: list[Line] | None = None

    def document(self) -> dict[str, Any]:
        """As `/v1/usage` answers; where several units were charged, the total has a charge for each."""
        units = {line.unit: line.charge for line in self.total}
        total: dict[str, Any] = {"requests": sum(line.requests for line in self.total)}
        total["charge"] = next(iter(units.values()), 0) if len(units) <= 1 else units
        total["unit"] = next(iter(units), None) if len(units) <= 1 else None
        document = {
            "total": total,
            "by_day": _named(self.by_day, "day"),
            "by_model": _named(self.by_model, "model"),
            "by_category": _named(self.by_category, "category"),
        }
        for name, lines in (("tenant", self.by_tenant), ("key", self.by_key)):
            if lines is not None:
                document[f"by_{name}"] = _named(lines, name)
        return document


def _named(lines: list[Line], name: str) -> list[dict[str, Any]]:
    return [
        {name: line.name, "requests": line.requests, "charge": line.charge, "unit": line.unit}
        for line in lines
    ]


async def read_usage(database: Database, asked: Asked, *, owners: bool = False) -> Usage:
    """The usage that was asked for, from the ledger and the rolled-up months, as of one moment.

    A rolled-up month counts where its first millisecond lies in the time that was asked for. With `owners`
    also by tenant and by key.

    Raises:
        DatabaseError: the database failed.
    """
    async with database.reading() as connection:
        cells = [
            (_day(day) if month == "" else month, model, category, line)
            for (day, month, model, category), line in await _sums(
                connection, asked, ("day", "month", "model", "category")
            )
        ]
        owned = await _sums(connection, asked, ("tenant_id", "key_id")) if owners else None
    return Usage(
        total=_summed([("total", line) for *_, line in cells]),
        by_day=_summed([(day, line) for day, _, _, line in cells]),
        by_model=_summed([(model, line) for _, model, _, line in cells]),
        by_category=_summed([(category, line) for _, _, category, line in cells]),
        by_tenant=None if owned is None else _summed([(tenant, line) for (tenant, _), line in owned]),
        by_key=None if owned is None else _summed([(key, line) for (_, key), line in owned]),
    )


async def was_used(database: Database, asked: Asked) -> bool:
    """Whether there is any row or sum of this key or tenant, of whatever time.

    Raises:
        DatabaseError: the database failed.
    """
    async with database.reading() as connection:
        for table in (schema.ledger, schema.rollups):
            query = _owned(select(table.c.key_id).limit(1), table, asked)
            if (await connection.execute(query)).first() is not None:
                return True
    return False


async def _sums(
    connection: AsyncConnection, asked: Asked, names: Sequence[str]
) -> list[tuple[tuple[Any, ...], Line]]:
    """Requests and charges for each value of these columns and each unit, ledger and roll-ups together."""
    rows = union_all(_from_ledger(asked, names), _from_rollups(asked, names)).subquery()
    columns = [rows.c[name] for name in (*names, "unit")]
    sums = func.sum(rows.c.requests), func.sum(rows.c.charge)
    found = await connection.execute(select(*columns, *sums).group_by(*columns))
    return [
        (tuple(values), Line("", unit, int(requests), int(charge)))
        for *values, unit, requests, charge in found
    ]


async def roll_up(database: Database, before: str) -> int:
    """Replaces the rows of all months before `before` ("2026-11") by sums; how many rows that were.

    Leases of those months that are settled go too. A month in which a worker's lease is open stays: it is
    settled from the rows.

    Raises:
        ValueError: `before` is no month, or one that is not over.
        DatabaseError: the database failed; nothing changed.
    """
    end = _month_start(before)
    if end > datetime.now(UTC).timestamp() * 1000:
        raise ValueError(f"{before} has not begun: only months that are over are rolled up.")
    ledger, rollups, leases = schema.ledger, schema.rollups, schema.leases
    rolled = 0
    async with database.writing() as connection:
        if connection.dialect.name == "postgresql":
            # The sums and the deletion must see the same rows; a late row then waits for the next time.
            await connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        open_leases = await connection.execute(
            select(leases.c.period).where(leases.c.settled_at.is_(None)).distinct()
        )
        kept = sorted({period[:7] for (period,) in open_leases})
        oldest = await connection.scalar(select(func.min(ledger.c.at)))
        for month in _months(oldest, end):
            if month in kept:
                continue
            start, stop = _month_start(month), _month_start(_next_month(month))
            inside = (ledger.c.at >= start) & (ledger.c.at < stop)
            names = ("tenant_id", "key_id", "model", "category", "unit")
            columns = [ledger.c[name] for name in names]
            sums = select(literal(month), *columns, func.count(), func.sum(ledger.c.charge))
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            insert = dialect.insert(rollups).from_select(
                ["month", *names, "requests", "charge"], sums.where(inside).group_by(*columns)
            )
            await connection.execute(
                insert.on_conflict_do_update(
                    index_elements=list(rollups.primary_key),
                    set_={
                        "requests": rollups.c.requests + insert.excluded.requests,
                        "charge": rollups.c.charge + insert.excluded.charge,
                    },
                )
            )
            rolled += (await connection.execute(delete(ledger).where(inside))).rowcount
            await connection.execute(
                delete(leases).where(leases.c.period.startswith(month), leases.c.settled_at.is_not(None))
            )
    return rolled


def _from_ledger(asked: Asked, names: Sequence[str]) -> Select[Any]:
    table = schema.ledger
    # A day that is no column yet, and the month of what is not rolled up.
    made = {"day": (table.c.at // _DAY_MS).label("day"), "month": literal("").label("month")}
    columns = _columns(table, made, names)
    query = select(*columns, func.count().label("requests"), func.sum(table.c.charge).label("charge"))
    query = query.group_by(*(column for column in columns if column is not made["month"]))
    if asked.since is not None:
        query = query.where(table.c.at >= asked.since)
    if asked.until is not None:
        query = query.where(table.c.at < asked.until)
    return _owned(query, table, asked)


def _from_rollups(asked: Asked, names: Sequence[str]) -> Select[Any]:
    table = schema.rollups
    made = {"day": literal(None).label("day")}
    columns = _columns(table, made, names)
    query = select(*columns, table.c.requests, table.c.charge)
    if asked.since is not None:
        first = _month_of(asked.since)
        if _month_start(first) < asked.since:
            first = _next_month(first)
        query = query.where(table.c.month >= first)
    if asked.until is not None:
        query = query.where(table.c.month <= _month_of(asked.until - 1))
    return _owned(query, table, asked)


def _columns(
    table: Any, made: Mapping[str, ColumnElement[Any]], names: Sequence[str]
) -> list[ColumnElement[Any]]:
    """The columns of these names and the unit; those that are `made` in place of the table's."""
    return [made[name] if name in made else table.c[name] for name in (*names, "unit")]


def _owned(query: Select[Any], table: Any, asked: Asked) -> Select[Any]:
    if asked.key_id is not None:
        query = query.where(table.c.key_id == asked.key_id)
    if asked.tenant_id is not None:
        query = query.where(table.c.tenant_id == asked.tenant_id)
    return query


def _summed(named: list[tuple[str, Line]]) -> list[Line]:
    sums: dict[tuple[str, str], Line] = {}
    for name, line in named:
        at = (name, line.unit)
        before = sums.get(at, Line(name, line.unit, 0, 0))
        sums[at] = Line(name, line.unit, before.requests + line.requests, before.charge + line.charge)
    return [sums[at] for at in sorted(sums)]


def _day(number: int) -> str:
    return datetime.fromtimestamp(number * _DAY_MS / 1000, UTC).strftime("%Y-%m-%d")


def _month_of(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m")


def _month_start(month: str) -> int:
    """Unix milliseconds of a month's begin.

    Raises:
        ValueError: it is no month.
    """
    try:
        return int(datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError:
        raise ValueError(f"{month!r} is no month: write it as 2026-11.") from None


def _next_month(month: str) -> str:
    year, number = int(month[:4]), int(month[5:])
    return f"{year + number // 12:04d}-{number % 12 + 1:02d}"


def _months(oldest: int | None, end: int) -> list[str]:
    """The months from the one of `oldest` up to, and without, the one that begins at `end`."""
    months: list[str] = []
    month = _month_of(oldest) if oldest is not None else _month_of(end)
    while _month_start(month) < end:
        months.append(month)
        month = _next_month(month)
    return months
