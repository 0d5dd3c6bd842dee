"""The pages that the gateway answers itself: models, health, readiness, metrics, documentation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from engine import __version__
from engine.errors import ApiError, nearest
from engine.gateway import schemas
from engine.gateway.admin import handle_failures
from engine.gateway.documents import add_forwarded
from engine.gateway.endpoints import ENDPOINTS
from engine.gateway.exchange import SCOPE_KEY, Exchange
from engine.gateway.invalid import invalid_request
from engine.gateway.loading import first_line, remaining_s
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.routing import SHARED, Directory, Served
from engine.gateway.scrape import scrape
from engine.metering.keyring import Caller

#: Where a standby model is in the course of its service, ready to be asked for.
_IN_SERVICE = ("asleep", "waking", "draining")
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def make_pages(directory: Directory, metrics: GatewayMetrics, *more: APIRouter) -> FastAPI:
    """The FastAPI application behind the forwarded endpoints, with `more` routes (admin, usage)."""
    pages = FastAPIOffline(
        title="Hearth",
        version=__version__,
        description="One OpenAI-format endpoint: chat, code, vision, images, audio, embeddings, detection.",
        redoc_url=None,
        static_url="/docs-files",
        redirect_slashes=False,
    )
    _handle_errors(pages)
    handle_failures(pages)

    @pages.get("/v1/models", tags=["models"], summary="The served models that the key may use")
    async def models(request: Request) -> schemas.ModelList:
        now, caller = time.time(), caller_of(request)
        return schemas.ModelList(
            data=[card_for(caller, directory, served, now) for served in directory if may_see(caller, served)]
        )

    @pages.get(
        "/v1/models/{id:path}",
        tags=["models"],
        summary="One model, by name or alias",
        responses={404: {"model": schemas.Error}},
    )
    async def model(request: Request, id: str) -> schemas.ModelCard:
        caller = caller_of(request)
        return card_for(caller, directory, find_for(caller, directory, id), time.time())

    @pages.head("/health", include_in_schema=False)
    @pages.get("/health", tags=["server"], summary="The gateway is alive")
    async def health() -> schemas.Health:
        return schemas.Health()

    @pages.head("/ready", include_in_schema=False)
    @pages.get(
        "/ready",
        tags=["server"],
        summary="Every model is warm",
        responses={503: {"model": schemas.Error}},
    )
    async def ready() -> schemas.Readiness:
        return readiness(directory, time.time())

    @pages.get("/metrics", tags=["server"], summary="Prometheus metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(directory) + await scrape(directory), media_type=_TEXT)

    for router in more:
        pages.include_router(router)
    _document(pages)
    return pages


def caller_of(request: Request) -> Caller | None:
    """Whose key a page was asked for with; None where none is needed."""
    exchange: Exchange = request.scope[SCOPE_KEY]
    return exchange.caller


def may_see(caller: Caller | None, served: Served) -> bool:
    """Whether a model is told of: only what the key may use, and nothing that is another tenant's alone."""
    if caller is None:
        return served.is_open(None)
    return caller.may_use(served.route.id, served.route.category) and served.is_open(caller.tenant)


def find_for(caller: Caller | None, directory: Directory, name: str) -> Served:
    """The model of a name or alias, for one who may use it.

    To a key that is held to some models the others are not there, as with OpenAI: the answer is the same for
    one that it may not use and for one that does not exist.

    Raises:
        ApiError: 404 `model_not_found`.
    """
    try:
        served = directory.find(name)
    except ApiError:
        if all(may_see(caller, each) for each in directory):
            raise
    else:
        if may_see(caller, served):
            return served
    shown = name if len(name) <= 100 else name[:100] + "…"
    raise ApiError(
        404,
        f"There is no model '{shown}' here, or this key may not use it. GET /v1/models lists those it may.",
        param="model",
        code="model_not_found",
    )


def card_for(caller: Caller | None, directory: Directory, served: Served, now: float) -> schemas.ModelCard:
    """A model as it is for one caller: where its tenant owns replicas, those count."""
    pool = served.owner(None if caller is None else caller.tenant)
    return card(served, now, directory.elapsed_s(served.route.id, pool), pool)


def card(served: Served, now: float, elapsed_s: float | None, pool: str = SHARED) -> schemas.ModelCard:
    """A model as the API tells of it, by the state of a pool; `elapsed_s` as of `Directory.elapsed_s`."""
    route = served.route_of(pool)
    loading = None
    if not served.replicas(pool):
        loading = schemas.Loading(
            state=route.state,
            reason=first_line(route.reason),
            elapsed_s=None if elapsed_s is None else round(elapsed_s, 1),
            expected_s=remaining_s(route, now),
        )
    return schemas.ModelCard(
        id=route.id,
        created=route.created,
        owned_by=route.owned_by,
        aliases=route.aliases,
        category=route.category,
        state=route.state,
        context_length=route.context_length,
        capabilities=route.capabilities,
        loading=loading,
    )


def readiness(directory: Directory, now: float) -> schemas.Readiness:
    """Says that all is warm.

    A sleeping model is where it should be, and so is a standby model on its way to or from sleep: they count
    as ready.

    Raises:
        ApiError: 503 `not_ready`, with a row for every model that is not.
    """
    rows: list[dict[str, Any]] = []
    pools: list[tuple[Served, str]] = []
    count = 0
    longest: float | None = 0.0
    for served in directory:
        count += 1
        pools += [(served, pool) for pool in served.pools]
    for served, pool in pools:
        route = served.route_of(pool)
        in_service = route.tier == "standby" and route.state in _IN_SERVICE
        if served.replicas(pool) or in_service or route.state == "asleep":
            continue
        left = remaining_s(route, now)
        longest = None if left is None or longest is None else max(longest, left)
        row = {"id": route.id, "state": route.state, "reason": first_line(route.reason), "expected_s": left}
        rows.append(row | ({"dedicated": True} if pool else {}))
    if count and not rows:
        return schemas.Readiness(ready=True, models=count)
    if not count:
        message = "No model is served yet: the scheduler has published no routes."
    else:
        names = ", ".join(
            f"{row['id']} ({row['state']}{', dedicated' if 'dedicated' in row else ''})" for row in rows
        )
        message = f"{len({row['id'] for row in rows})} of {count} models are not ready: {names}."
    retry = 5 if longest is None else min(120, max(1, round(longest)))
    raise ApiError(
        503,
        message,
        code="not_ready",
        headers={"retry-after": str(retry)},
        extra={"ready": False, "models": rows},
    )


def _handle_errors(pages: FastAPI) -> None:
    """Every failure of a page becomes the envelope; an unexpected one is the application's to tell."""

    @pages.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> Response:
        return envelope(error)

    @pages.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # Starlette raises the exception again after this answer, so it is logged with its traceback by the
        # application.
        return envelope(
            ApiError(500, "Something went wrong here; it is not your request.", code="internal_error")
        )

    @pages.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return envelope(unknown_path(request.method, request.url.path, pages))
        if error.status_code == 405:
            return envelope(wrong_method(request.method, request.url.path, dict(error.headers or {})))
        return envelope(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @pages.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return envelope(invalid_request(error.errors()))


def envelope(error: ApiError) -> Response:
    return Response(
        error.body(), status_code=error.status, headers=error.headers, media_type="application/json"
    )


def unknown_path(method: str, path: str, pages: FastAPI) -> ApiError:
    """The 404 for a path that is none of ours, with the one that was probably meant."""
    known = [*ENDPOINTS, "/v1/models", "/v1/usage", "/health", "/ready", "/metrics", "/docs", "/openapi.json"]
    shown = path if len(path) <= 200 else path[:200] + "…"
    with_version = f"/v1{path.rstrip('/')}"
    if with_version in known:
        close = [with_version]
    elif path.rstrip("/") in known:
        close = [path.rstrip("/")]
    else:
        close = nearest(path[:200], known, most=1)
    hint = f" Did you mean {close[0]}?" if close else " GET /docs lists the endpoints."
    return ApiError(404, f"There is no {method} {shown} here.{hint}", code="unknown_url")


def wrong_method(method: str, path: str, headers: dict[str, str]) -> ApiError:
    """The 405; `headers` name the methods that are allowed."""
    allowed = headers.get("Allow") or headers.get("allow") or ""
    return ApiError(
        405, f"{path} does not take {method}. Use {allowed}.", code="method_not_allowed", headers=headers
    )


def _document(pages: FastAPI) -> None:
    """Makes /openapi.json tell of the forwarded endpoints too."""
    own: Callable[[], dict[str, Any]] = pages.openapi

    def whole() -> dict[str, Any]:
        if pages.openapi_schema is None:
            pages.openapi_schema = add_forwarded(own())
        return pages.openapi_schema

    # FastAPI's documented way to extend its schema is to replace this method on the instance.
    pages.openapi = whole  # type: ignore[method-assign]
