"""Finding tenants and plans by what a person calls them, and what is said when that fails."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Table, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.errors import nearest


class AccessError(Exception):
    """A key, tenant or plan cannot be as asked; the message names it, the reason and the next step."""


class NotFoundError(AccessError):
    """There is none of that name."""


class ConflictError(AccessError):
    """What is there already stands against it."""


async def find_id(connection: AsyncConnection, table: Table, named: str) -> str:
    """The id of a tenant or plan, by id or name.

    Raises:
        NotFoundError: there is none; the message has the nearest.
    """
    if is_text(named):
        wanted = select(table.c.id).where(or_(table.c.id == named, table.c.name == named))
        # An id wins over a name that looks like one.
        found = (await connection.execute(wanted.order_by(table.c.id != named))).scalars().first()
        if found is not None:
            return str(found)
    known = (await connection.execute(select(table.c.name).limit(1000))).scalars().all()
    kind = table.name.removesuffix("s")
    raise NotFoundError(f"There is no {kind} '{shown(named)}'. {hint(named, known, table.name)}")


def is_text(named: str) -> bool:
    """Whether a database takes it: PostgreSQL refuses NUL, and neither takes bytes that are no UTF-8."""
    return "\0" not in named and not any("\ud800" <= character <= "\udfff" for character in named)


def shown(named: str) -> str:
    """A name as it may stand in a message, whatever was given."""
    short = named if len(named) <= 80 else f"{named[:80]}…"
    return short if short.isprintable() else ascii(short)[1:-1]


def hint(named: str, known: Iterable[str], kinds: str) -> str:
    """The nearest known name, or where all of them are listed."""
    close = nearest(named[:80], known, most=1)
    return f"Did you mean '{close[0]}'?" if close else f"`hearth {kinds} list` shows all."


def checked_name(name: str) -> str:
    """A name without spaces around it.

    Raises:
        AccessError: it is empty, longer than 200 characters or holds control characters.
    """
    name = name.strip()
    if not 0 < len(name) <= 200 or not name.isprintable():
        raise AccessError("A name has 1 to 200 printable characters.")
    return name
