"""What was used: totals by day, model, category, key and tenant.

Days and months are UTC. Of old months there are sums in place of rows (`retention.py`); a total is the same
before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, func, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import keys, schema, tenants
from engine.metering.database import Database
from engine.metering.lookup import NotFoundError
from engine.metering.moments import Span
from engine.metering.pricing import period_name

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


async def asked_of(database: Database, tenant: str | None, key: str | None, span: Span) -> Asked:
    """What is asked for by names or ids; a key or tenant that is no more, but was charged, goes by its id.

    Raises:
        AccessError: there is none of that name, or there are several.
        DatabaseError: the database failed.
    """
    tenant_id, key_id = tenant, key
    try:
        tenant_id = None if tenant is None else (await tenants.find(database, tenant)).id
    except NotFoundError:
        if not await was_used(database, Asked(tenant_id=tenant)):
            raise
    try:
        key_id = None if key is None else (await keys.find(database, key)).id
    except NotFoundError:
        if not await was_used(database, Asked(key_id=key)):
            raise
    return Asked(key_id, tenant_id, span.since, span.until)


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
        # The first month that begins no earlier.
        before = period_name("month", max(0, asked.since - 1))
        query = query.where(table.c.month > before) if asked.since > 0 else query
    if asked.until is not None:
        query = query.where(table.c.month <= period_name("month", max(0, asked.until - 1)))
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
