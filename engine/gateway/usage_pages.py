"""`GET /v1/usage` for the caller and `/admin/v1/usage` for administrators.

Both read the database, where a worker's rows arrive within about 0.3 s of their answers; `settle` brings this
worker's own there first, so that a caller finds its last request in the sums.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from engine.errors import ApiError, bad_request
from engine.gateway.admin import FAILURES
from engine.gateway.standing import PlanStanding, plan_standing
from engine.metering.database import Database, DatabaseAwayError, DatabaseError
from engine.metering.keyring import Caller
from engine.metering.moments import MomentError, Span, parse_moment, shown_moment, span_of
from engine.metering.standing import read_standing
from engine.metering.usage import Asked, asked_of, read_usage

log = logging.getLogger("hearth.usage")

#: Whom requests count for where the server asks for no keys.
ANONYMOUS, DEFAULT_TENANT = "anonymous", "default"

_MOMENT = "A date (2026-11-01, its beginning in UTC), an RFC 3339 time, or unix seconds"
Since = Annotated[
    str | None,
    Query(description=f"{_MOMENT}; included. Default: the beginning of the present period (see `plan`)."),
]
Until = Annotated[
    str | None, Query(description=f"{_MOMENT}; not included. Default: the end of the present period.")
]


class Sum(BaseModel):
    """Requests that were answered, and what they were charged."""

    requests: int
    charge: int | dict[str, int] = Field(
        description="In `unit`, whole numbers (cents, not euros); where several units were charged, one "
        "number for each."
    )
    unit: str | None = Field(description="'credits' or a currency; null where there is none or several.")


class _Part(BaseModel):
    """Requests that were charged in one unit."""

    requests: int
    charge: int
    unit: str


class _Day(BaseModel):
    day: str = Field(description="UTC; a month ('2026-11') where old days were rolled up.")


class _Model(BaseModel):
    model: str


class _Category(BaseModel):
    category: str


class _Tenant(BaseModel):
    tenant: str = Field(description="Its id.")


class _Key(BaseModel):
    key: str = Field(description="Its id.")


# The fields of the last base come first.
class DayPart(_Part, _Day):
    """Requests of one day that were charged in one unit."""


class ModelPart(_Part, _Model):
    """Requests to one model."""


class CategoryPart(_Part, _Category):
    """Requests to models of one category."""


class TenantPart(_Part, _Tenant):
    """Requests of one tenant."""


class KeyPart(_Part, _Key):
    """Requests of one key."""


class UsageAnswer(BaseModel):
    """What was used from `since` up to `until`."""

    object: Literal["usage"] = "usage"
    since: str
    until: str
    total: Sum
    by_day: list[DayPart]
    by_model: list[ModelPart]
    by_category: list[CategoryPart]


class CallerUsage(UsageAnswer):
    """The usage of the caller's key, or of its whole tenant."""

    scope: Literal["key", "tenant"]
    key: str | None = Field(description="The key's id; null with scope=tenant.")
    tenant: str
    plan: PlanStanding | None = Field(description="null where the key has none: nothing is charged.")


class AdminUsage(UsageAnswer):
    """The usage of all, of a tenant or of a key."""

    key: str | None
    tenant: str | None
    by_tenant: list[TenantPart]
    by_key: list[KeyPart]


async def _nothing() -> None:
    return


def make_usage(
    database: Database,
    *,
    who: Callable[[Request], Caller | None],
    settle: Callable[[], Awaitable[None]] = _nothing,
    clock: Callable[[], float] = time.time,
) -> APIRouter:
    """The routes. `who` tells whose key a request bears (None: the server asks for none)."""
    router = APIRouter()

    @router.get(
        "/v1/usage",
        tags=["usage"],
        summary="What your key, or your tenant, used and was charged",
        responses={name: FAILURES[name] for name in (400, 401, 503)},
    )
    async def usage(
        request: Request,
        since: Since = None,
        until: Until = None,
        scope: Annotated[
            Literal["key", "tenant"], Query(description="'tenant': the sums of all keys of your tenant.")
        ] = "key",
    ) -> CallerUsage:
        caller, now = who(request), round(clock() * 1000)
        period = caller.plan.spec.period if caller is not None and caller.plan is not None else "month"
        span = _span(since, until, period, now)
        key = ANONYMOUS if caller is None else caller.key.id
        tenant = DEFAULT_TENANT if caller is None else caller.tenant.id
        asked = Asked(
            None if scope == "tenant" else key, tenant if scope == "tenant" else None, span.since, span.until
        )
        try:
            await settle()
            found = await read_usage(database, asked)
            standing = None if caller is None else await read_standing(database, caller, now)
        except DatabaseError as error:
            raise _unreadable(error) from error
        return CallerUsage(
            **_document(found.document(), span),
            scope=scope,
            key=asked.key_id,
            tenant=tenant,
            plan=None if standing is None else plan_standing(standing),
        )

    @router.get(
        "/admin/v1/usage",
        tags=["admin"],
        summary="What all, a tenant or a key used and were charged",
        responses=FAILURES,
    )
    async def all_usage(
        since: Since = None,
        until: Until = None,
        tenant: Annotated[str | None, Query(description="Id or name.")] = None,
        key: Annotated[str | None, Query(description="Id, name or first 11 characters.")] = None,
    ) -> AdminUsage:
        span = _span(since, until, "month", round(clock() * 1000))
        await settle()
        asked = await asked_of(database, tenant, key, span)
        found = await read_usage(database, asked, owners=True)
        return AdminUsage(**_document(found.document(), span), key=asked.key_id, tenant=asked.tenant_id)

    return router


def _span(since: str | None, until: str | None, period: Literal["month", "day"], now: int) -> Span:
    """The time that is asked for.

    Raises:
        ApiError: 400 `invalid_time`, naming the parameter at fault.
    """
    given: dict[str, int | None] = {}
    for name, text in (("since", since), ("until", until)):
        try:
            given[name] = None if text is None else parse_moment(text)
        except MomentError as error:
            raise bad_request(f"{name}: {error}", param=name, code="invalid_time") from error
    try:
        return span_of(given["since"], given["until"], period, now)
    except MomentError as error:
        raise bad_request(
            f"{str(error)[0].upper()}{str(error)[1:]}", param="since", code="invalid_time"
        ) from error


def _document(sums: dict[str, Any], span: Span) -> dict[str, Any]:
    return {"since": shown_moment(span.since), "until": shown_moment(span.until), **sums}


def _unreadable(error: DatabaseError) -> ApiError:
    """What a caller is told: not where the database is."""
    log.error("usage cannot be read: %s", error)
    if isinstance(error, DatabaseAwayError):
        return ApiError(
            503,
            "The usage cannot be read for now: the database is away. Nothing is lost meanwhile; try again "
            "in a moment.",
            code="usage_unavailable",
            headers={"retry-after": "5"},
        )
    return ApiError(500, "The usage cannot be read; the operator finds why in the log.", code="usage_failed")
