"""API keys: made once, shown once, kept as SHA-256 digests with what they allow.

A key has 256 random bits, so a plain digest is enough: there is no dictionary to try.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import time
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from sqlalchemy import RowMapping, and_, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering.changes import ACCESS, bump
from engine.metering.database import Database
from engine.metering.lookup import (
    AccessError,
    ConflictError,
    NotFoundError,
    checked_name,
    find_id,
    hint,
    is_text,
    shown,
)
from engine.metering.schema import keys, plans, tenants
from engine.runners.spec import Category

#: A key shorter than this is shown by no prefix: too much of it would be seen.
_PREFIX_FROM = 24
#: The latest moment that a time may name: the year 9999.
_LAST_MS = 253_402_300_799_000


class Allowed(BaseModel):
    """What a key may be used for; an empty list allows all."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    models: tuple[str, ...] = Field(default=(), description="Models, by name.")
    categories: tuple[Category, ...] = Field(default=(), description="Categories of models.")
    addresses: tuple[str, ...] = Field(
        default=(), description="Callers' addresses or networks, for instance 10.0.0.0/8."
    )

    @field_validator("addresses")
    @classmethod
    def _networks(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        networks = []
        for each in given:
            try:
                networks.append(str(ipaddress.ip_network(each.strip(), strict=False)))
            except ValueError:
                raise ValueError(
                    f"'{shown(each)}' is neither an address nor a network: write for instance 10.0.0.0/8"
                ) from None
        return tuple(networks)

    @field_validator("models")
    @classmethod
    def _names(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for each in given:
            if not 0 < len(each) <= 200 or not each.isprintable() or each != each.strip():
                raise ValueError(
                    f"'{shown(each)}' is no model's name: those have 1 to 200 printable characters, none of "
                    "them a space at an end"
                )
        return given


class Key(BaseModel):
    """What is kept of one key; the key itself is not. Times are unix milliseconds."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    id: str
    tenant_id: str
    plan_id: str | None = Field(default=None, description="A plan of its own; None = its tenant's.")
    name: str
    prefix: str = Field(description="The key's first characters, for a person to tell it by.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    admin: bool = Field(default=False, description="May use /admin/v1.")
    allowed: Allowed = Allowed()

    def state(self, now_ms: int) -> Literal["valid", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and now_ms >= self.expires_at:
            return "expired"
        return "valid"


def make_key() -> str:
    """A new key: `hearth-` and 43 URL-safe characters."""
    return "hearth-" + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """The hexadecimal SHA-256 that stands for a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def now_ms() -> int:
    return int(time.time() * 1000)


def read_allowed(data: Any) -> Allowed:
    """What a key allows, from what a person wrote.

    Raises:
        AccessError: a category is unknown, or an address is none.
    """
    try:
        return Allowed.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "value_error":
            raise AccessError(f"{where}: {first['ctx']['error']}.") from error
        given = shown(str(first.get("input")))
        raise AccessError(f"{where}: {first['msg']} (got '{given}').") from error


async def create(
    database: Database,
    *,
    name: str = "default",
    tenant: str = "default",
    plan: str | None = None,
    expires_at: int | None = None,
    admin: bool = False,
    allowed: Allowed | None = None,
    key: str | None = None,
) -> tuple[str, Key]:
    """Makes a key for a tenant: the key, to be shown this once, and what is kept of it.

    Args:
        database: where.
        name: what it is for.
        tenant: id or name.
        plan: id or name of a plan of its own; None = its tenant's.
        expires_at: unix milliseconds.
        admin: whether it may use the admin API.
        allowed: models, categories and addresses.
        key: a key that a person brings; one that is there already stays as it is.

    Raises:
        AccessError: no such tenant or plan, the tenant is closed, the time is past, the name or key cannot be
            one.
        DatabaseError: the database fails.
    """
    text = make_key() if key is None else _checked(key)
    name = checked_name(name)
    at = now_ms()
    if expires_at is not None and expires_at <= at:
        raise AccessError(
            f"The key would have expired already: give a time that is yet to come (here it is {_when(at)})."
        )
    if expires_at is not None and expires_at > _LAST_MS:
        raise AccessError(
            f"The key would end after {_when(_LAST_MS)}, the last time that can be kept. Give an earlier "
            "one, or none: the key then never ends."
        )
    async with database.writing() as connection:
        version = await bump(connection, ACCESS)
        known = await _by_digest(connection, digest_of(text))
        if known is not None:
            return text, known
        tenant_id = await _open_tenant(connection, tenant)
        plan_id = None if plan is None else await find_id(connection, plans, plan)
        made = Key(
            id=f"key_{secrets.token_hex(6)}",
            tenant_id=tenant_id,
            plan_id=plan_id,
            name=name,
            prefix=text[:11] if len(text) >= _PREFIX_FROM else "",
            sha256=digest_of(text),
            created_at=at,
            expires_at=expires_at,
            admin=admin,
            allowed=allowed or Allowed(),
        )
        await add(connection, made, version)
    return text, made


async def add(connection: AsyncConnection, key: Key, version: int) -> None:
    """Writes a key's row, in a transaction that has counted its change as `version`."""
    await connection.execute(insert(keys).values(**key.model_dump(mode="json"), version=version))


async def list_keys(database: Database, *, tenant: str | None = None) -> list[Key]:
    """All keys, oldest first, also revoked and expired ones; of one tenant (id or name) where given.

    Raises:
        AccessError: no such tenant.
        DatabaseError: the database fails.
    """
    async with database.reading() as connection:
        wanted = select(keys).order_by(keys.c.created_at, keys.c.id)
        if tenant is not None:
            wanted = wanted.where(keys.c.tenant_id == await find_id(connection, tenants, tenant))
        return [_key(row) for row in (await connection.execute(wanted)).mappings()]


async def find(database: Database, named: str) -> Key:
    """A key by its id, its name, its first 11 characters, or itself.

    Raises:
        AccessError: there is none, or several.
        DatabaseError: the database fails.
    """
    async with database.reading() as connection:
        return await _find(connection, named)


async def rotate(database: Database, named: str, *, keep_ms: int = 0) -> tuple[str, Key, Key]:
    """A new key in place of an old one, with the same terms; the old one is good for `keep_ms` more.

    Returns the new key to be shown this once, what is kept of it, and the old one as it is now.

    Raises:
        AccessError: there is no such key, it is revoked or expired, or `keep_ms` is negative.
        DatabaseError: the database fails.
    """
    if keep_ms < 0:
        raise AccessError("The old key cannot end in the past: give 0 or more.")
    text = make_key()
    at = now_ms()
    async with database.writing() as connection:
        version = await bump(connection, ACCESS)
        old = await _find(connection, named)
        if old.state(at) != "valid":
            raise ConflictError(f"{old.id} is {old.state(at)}: only a valid key is rotated. Make a new one.")
        ends = min(at + keep_ms, _LAST_MS, old.expires_at or _LAST_MS)
        new = old.model_copy(
            update={
                "id": f"key_{secrets.token_hex(6)}",
                "prefix": text[:11],
                "sha256": digest_of(text),
                "created_at": at,
            }
        )
        ended = {"expires_at": ends} if keep_ms else {"revoked_at": at}
        await connection.execute(update(keys).where(keys.c.id == old.id).values(**ended, version=version))
        await add(connection, new, version)
    return text, new, old.model_copy(update=ended)


async def revoke(database: Database, named: str) -> Key:
    """Ends a key for good, within a second on every gateway; one that is revoked already stays so.

    Raises:
        AccessError: there is none of that id or name, or several.
        DatabaseError: the database fails.
    """
    async with database.writing() as connection:
        version = await bump(connection, ACCESS)
        key = await _find(connection, named)
        if key.revoked_at is not None:
            return key
        at = now_ms()
        await connection.execute(
            update(keys).where(keys.c.id == key.id).values(revoked_at=at, version=version)
        )
    return key.model_copy(update={"revoked_at": at})


async def _open_tenant(connection: AsyncConnection, named: str) -> str:
    id = await find_id(connection, tenants, named)
    closed = (await connection.execute(select(tenants.c.closed_at).where(tenants.c.id == id))).scalar()
    if closed is not None:
        raise ConflictError(f"The tenant '{named}' is closed. Open it again (`hearth tenants open {named}`).")
    return id


async def _find(connection: AsyncConnection, named: str) -> Key:
    digest = digest_of(named) if is_text(named) else ""
    wanted = select(keys).where(
        or_(
            keys.c.id == named,
            keys.c.name == named,
            keys.c.sha256 == digest,
            and_(keys.c.prefix == named, keys.c.prefix != ""),
        )
    )
    rows = (await connection.execute(wanted)).mappings().all() if is_text(named) else []
    found = [_key(row) for row in rows]
    chosen = [key for key in found if key.id == named or key.sha256 == digest] or found
    at = now_ms()
    if len(chosen) > 1:
        # A rotated key has its successor's name.
        chosen = [key for key in chosen if key.state(at) == "valid"] or chosen
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        listed = ", ".join(f"{key.id} ({key.prefix}…, {key.state(at)})" for key in chosen)
        raise ConflictError(f"{len(chosen)} keys are called '{named}': {listed}. Name one by its id.")
    known = (await connection.execute(select(keys.c.name).limit(1000))).scalars().all()
    # What was given may be a key: it is not repeated.
    short = shown(named) if len(named) < _PREFIX_FROM else f"{shown(named[:11])}…"
    raise NotFoundError(f"There is no key '{short}'. {hint(short, known, 'keys')}")


async def _by_digest(connection: AsyncConnection, digest: str) -> Key | None:
    row = (await connection.execute(select(keys).where(keys.c.sha256 == digest))).mappings().first()
    return None if row is None else _key(row)


def _key(row: RowMapping) -> Key:
    return Key.model_validate(dict(row))


def _when(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def _checked(key: str) -> str:
    if not key or not all("!" <= character <= "~" for character in key):
        raise AccessError("A key is made of printable ASCII characters without spaces, at least one.")
    return key
