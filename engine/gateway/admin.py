"""`/admin/v1`: keys, tenants and plans over HTTP. The application lets administrators' keys alone through.

Names in paths are ids or names. Times are unix milliseconds, amounts whole numbers in a plan's unit.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from engine.errors import ApiError
from engine.gateway import schemas
from engine.gateway.standing import PlanStanding, plan_standing
from engine.metering import keys, planstore, tenants
from engine.metering.callers import key_standing, tenant_standing
from engine.metering.database import Database, DatabaseAwayError, DatabaseError
from engine.metering.keyring import KeyRing
from engine.metering.keys import Allowed, Key, now_ms
from engine.metering.lookup import AccessError, ConflictError, NotFoundError
from engine.metering.plans import Plan, PlanSpec, Unit
from engine.metering.tenants import Tenant

_T = TypeVar("_T")


class Listed(BaseModel, Generic[_T]):
    """All of a kind, oldest first."""

    object: Literal["list"] = "list"
    data: list[_T]


class KeyCard(BaseModel):
    """What is told of a key; the key itself is shown once, by the call that makes it."""

    id: str
    state: Literal["valid", "expired", "revoked"]
    tenant_id: str
    plan_id: str | None = Field(description="A plan of its own; null = its tenant's.")
    name: str
    prefix: str = Field(description="The key's first characters.")
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    admin: bool
    allowed: Allowed


class KeyDetail(KeyCard):
    """A key with the plan that applies to it and where it stands under that."""

    plan: Plan | None = Field(description="Its own, or its tenant's; null = no price and no limits.")
    standing: PlanStanding | None = Field(description="In the present period; null without a plan.")


class TenantDetail(Tenant):
    """A tenant with its plan and where it stands under that."""

    plan: Plan | None
    standing: PlanStanding | None = Field(
        description="In the present period; null without a plan, and where each key counts by itself."
    )


class NewKey(KeyCard):
    """A key that was made, shown this once."""

    key: str


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KeyAsked(_Asked):
    """A key to make."""

    name: str = "default"
    tenant: str = Field(default="default", description="Id or name.")
    plan: str | None = Field(default=None, description="Id or name; null = its tenant's.")
    expires_at: int | None = Field(default=None, description="null = never.")
    admin: bool = False
    allowed: dict[str, list[str]] = Field(
        default_factory=dict, description="Lists of `models`, `categories`, `addresses`; none = all."
    )


class RotationAsked(_Asked):
    """How long the old key stays good."""

    keep_s: int = Field(default=86_400, ge=0, le=10**9, description="Seconds; 0 = it ends at once.")


class TenantAsked(_Asked):
    """A tenant to make."""

    name: str
    plan: str | None = Field(default=None, description="Id or name; null = no price and no limits.")


class TenantChange(_Asked):
    """What is to change; what is left out stays."""

    plan: str | None = Field(default=None, description="Id or name; null = no plan.")
    closed: bool | None = Field(default=None, description="True: its keys are refused.")


class PlanAsked(_Asked):
    """A plan to make."""

    name: str
    unit: Unit = "credits"
    currency: str = Field(default="", description="ISO 4217 with unit 'minor'.")
    spec: PlanSpec


#: What may go wrong with each of these, for the documentation.
FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.Error, "description": "A value cannot be so."},
    401: {"model": schemas.Error, "description": "No valid key."},
    403: {"model": schemas.Error, "description": "Not an administrator's key."},
    404: {"model": schemas.Error, "description": "There is none of that name."},
    409: {"model": schemas.Error, "description": "What is there stands against it."},
    503: {"model": schemas.Error, "description": "The database is away (retry-after)."},
}

Named = Annotated[str, Field(description="Id or name.")]


def make_admin(database: Database, ring: KeyRing) -> APIRouter:
    """The routes of `/admin/v1`; each change is in force on this worker when it is answered."""
    router = APIRouter(prefix="/admin/v1", tags=["admin"], responses=FAILURES)
    _add_keys(router, database, ring)
    _add_tenants(router, database, ring)
    _add_plans(router, database, ring)
    return router


def _add_keys(router: APIRouter, database: Database, ring: KeyRing) -> None:
    @router.get("/keys", summary="All keys, or a tenant's")
    async def list_keys(tenant: str | None = None) -> Listed[KeyCard]:
        return Listed(data=[_card(key) for key in await keys.list_keys(database, tenant=tenant)])

    @router.post("/keys", status_code=201, summary="Make a key; it is shown this once")
    async def create_key(asked: KeyAsked) -> NewKey:
        text, key = await keys.create(
            database,
            name=asked.name,
            tenant=asked.tenant,
            plan=asked.plan,
            expires_at=asked.expires_at,
            admin=asked.admin,
            allowed=keys.read_allowed(asked.allowed),
        )
        await ring.refresh()
        return NewKey(key=text, **_card(key).model_dump())

    @router.get("/keys/{key}", summary="One key, its plan and where it stands")
    async def show_key(key: Named) -> KeyDetail:
        caller, standing = await key_standing(database, key, now_ms())
        return KeyDetail(
            **_card(caller.key).model_dump(),
            plan=caller.plan,
            standing=None if standing is None else plan_standing(standing),
        )

    @router.post("/keys/{key}/rotate", status_code=201, summary="A new key with the same terms")
    async def rotate_key(key: Named, asked: RotationAsked | None = None) -> NewKey:
        keep_s = (asked or RotationAsked()).keep_s
        text, new, _ = await keys.rotate(database, key, keep_ms=keep_s * 1000)
        await ring.refresh()
        return NewKey(key=text, **_card(new).model_dump())

    @router.post("/keys/{key}/revoke", summary="End a key for good, everywhere within a second")
    async def revoke_key(key: Named) -> KeyCard:
        ended = await keys.revoke(database, key)
        await ring.refresh()
        return _card(ended)


def _add_tenants(router: APIRouter, database: Database, ring: KeyRing) -> None:
    @router.get("/tenants", summary="All tenants")
    async def list_tenants() -> Listed[Tenant]:
        return Listed(data=await tenants.list_tenants(database))

    @router.post("/tenants", status_code=201, summary="Make a tenant")
    async def create_tenant(asked: TenantAsked) -> Tenant:
        return await tenants.create(database, asked.name, plan=asked.plan)

    @router.get("/tenants/{tenant}", summary="One tenant, its plan and where it stands")
    async def show_tenant(tenant: Named) -> TenantDetail:
        found, plan, standing = await tenant_standing(database, tenant, now_ms())
        return TenantDetail(
            **found.model_dump(),
            plan=plan,
            standing=None if standing is None else plan_standing(standing),
        )

    @router.patch("/tenants/{tenant}", summary="Give a tenant another plan, close it or open it again")
    async def change_tenant(tenant: Named, asked: TenantChange) -> Tenant:
        # By its id, which stays whatever else changes it meanwhile.
        id = (await tenants.find(database, tenant)).id
        if "plan" in asked.model_fields_set:
            await tenants.set_plan(database, id, asked.plan)
        if asked.closed is not None:
            await (tenants.close if asked.closed else tenants.reopen)(database, id)
        await ring.refresh()
        return await tenants.find(database, id)


def _add_plans(router: APIRouter, database: Database, ring: KeyRing) -> None:
    @router.get("/plans", summary="All plans")
    async def list_plans() -> Listed[Plan]:
        return Listed(data=await planstore.list_plans(database))

    @router.post("/plans", status_code=201, summary="Make a plan")
    async def create_plan(asked: PlanAsked) -> Plan:
        return await planstore.create(
            database, asked.name, asked.spec, unit=asked.unit, currency=asked.currency
        )

    @router.get("/plans/{plan}", summary="One plan")
    async def show_plan(plan: Named) -> Plan:
        return await planstore.find(database, plan)

    @router.put("/plans/{plan}", summary="Give a plan other terms, for requests from now on")
    async def change_plan(plan: Named, spec: PlanSpec) -> Plan:
        changed = await planstore.change(database, plan, spec)
        await ring.refresh()
        return changed

    @router.delete("/plans/{plan}", summary="Remove a plan that nobody has")
    async def delete_plan(plan: Named) -> Plan:
        return await planstore.delete(database, plan)


def handle_failures(pages: FastAPI) -> None:
    """Failures of keys, tenants, plans and their database become the envelope."""

    @pages.exception_handler(AccessError)
    async def access(request: Request, error: AccessError) -> Response:
        return _envelope(as_api_error(error))

    @pages.exception_handler(DatabaseError)
    async def database(request: Request, error: DatabaseError) -> Response:
        return _envelope(as_api_error(error))


def as_api_error(error: AccessError | DatabaseError) -> ApiError:
    """What an administrator is told."""
    if isinstance(error, NotFoundError):
        return ApiError(404, str(error), code="not_found")
    if isinstance(error, ConflictError):
        return ApiError(409, str(error), code="conflict")
    if isinstance(error, AccessError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, DatabaseAwayError):
        return ApiError(503, str(error), code="database_away", headers={"retry-after": "5"})
    return ApiError(500, str(error), code="database_failed")


def _envelope(error: ApiError) -> Response:
    return Response(
        error.body(), status_code=error.status, headers=error.headers, media_type="application/json"
    )


def _card(key: Key) -> KeyCard:
    return KeyCard(state=key.state(now_ms()), **key.model_dump(exclude={"sha256"}))
