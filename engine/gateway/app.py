"""The gateway's ASGI application: authenticates, admits, routes, records.

The life of a request: an id, the key, the body (bounded), `model` and `stream` read from it, the model's
row of the route table, pictures made safe, a replica chosen, bytes passed both ways, one log line.
Forwarded paths are matched before FastAPI, which answers everything else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from functools import partial

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.config import Config
from engine.errors import ApiError
from engine.gateway.accesslog import log_request
from engine.gateway.admin import make_admin
from engine.gateway.auth import authenticate, check_admin, check_allowed
from engine.gateway.body import check_json_type, json_head, read_body
from engine.gateway.charging import Charging
from engine.gateway.content import refuse_pictures
from engine.gateway.context import PATHS as COUNTED
from engine.gateway.context import check_context
from engine.gateway.control import ControlClient
from engine.gateway.endpoints import ENDPOINTS, Endpoint, check_category
from engine.gateway.exchange import CLIENT_GONE, SCOPE_KEY, ClientGoneError, Exchange, send_error
from engine.gateway.fair.gate import Gate
from engine.gateway.fim import fill_in_middle
from engine.gateway.firstbytes import FirstBytes
from engine.gateway.forward import Forwarder
from engine.gateway.guard import WhileClientWaits
from engine.gateway.images import ImageFetcher
from engine.gateway.images_body import Endpoint as PicturesOf
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.multipart import is_multipart, multipart_head
from engine.gateway.origin import Origins
from engine.gateway.pages import make_pages, wrong_method
from engine.gateway.routing import Directory
from engine.gateway.upstream import Upstream
from engine.gateway.usage import UsageReporter
from engine.gateway.usage_pages import make_usage
from engine.gateway.waking import Waking
from engine.gateway.watch import RouteWatch
from engine.metering.books import Books
from engine.metering.database import Database, DatabaseAwayError, DatabaseError, url_of
from engine.metering.housekeeping import Housekeeping
from engine.metering.keyring import KeyRing
from engine.metering.lookup import AccessError
from engine.metering.opening import prepare
from engine.routes import ModelRoute

log = logging.getLogger("hearth.gateway")

_EXPOSED = [
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "retry-after-ms",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-hearth-charge",
    "x-hearth-charge-unit",
    "x-hearth-budget-remaining",
]

_STOPPING = ApiError(
    503,
    "The server is stopping and could not finish this request. Send it again.",
    code="server_stopping",
    headers={"retry-after": "5"},
)


class Gateway:
    """An ASGI application; one per gateway process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.database = Database(url_of(config))
        self.ring = KeyRing(self.database, snapshot=config.keys_snapshot)
        self._origins = Origins(config.gateway.trusted_proxies)
        self.directory = Directory(self._make_upstream)
        self.metrics = GatewayMetrics()
        self._watch = RouteWatch(self.directory, socket=config.control_socket, file=config.routes_file)
        self._pictures = ImageFetcher(config.fetch)
        self._control = ControlClient(config.control_socket)
        self._waking = Waking(self.directory, self.metrics, self._control, worker=os.getpid())
        first_bytes = FirstBytes()
        self._gate = Gate(config, self.directory, self.metrics)
        self._usage = UsageReporter(
            self.directory, self._waking, self._gate, first_bytes, self._control, worker=os.getpid()
        )
        self._forwarder = Forwarder(self.directory, self.metrics, self._waking, first_bytes, self._gate)
        self._housekeeping = Housekeeping(
            self.database, config.ledger_dir, keep_months=config.metering.keep_months
        )
        #: From `start` on; None while metering is off.
        self._charging: Charging | None = None
        self._pages = make_pages(
            self.directory,
            self.metrics,
            make_admin(self.database, self.ring),
            make_usage(
                self.database, who=lambda request: request.scope[SCOPE_KEY].caller, settle=self._settled
            ),
        )
        self._entry: ASGIApp = self._answer
        if config.gateway.cors_origins:
            self._entry = CORSMiddleware(
                self._answer,
                allow_origins=config.gateway.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=_EXPOSED,
            )

    async def start(self) -> None:
        """Reads keys and routes and begins to follow them.

        Raises:
            DatabaseError: the database cannot be used, now or later.
        """
        try:
            await prepare(self.database, self._config)
        except (AccessError, DatabaseAwayError) as error:
            # Models are served by whoever has the keys; the ring goes on trying.
            log.error("%s", error)
        await self.ring.start()
        if self._config.metering.enabled:
            self._charging = await Charging.open(
                self._config, self.database, self._housekeeping, self.metrics, self.ring.now_ms
            )
        await self._pictures.start()
        await self._control.start()
        await self._usage.start()
        await self._watch.start()
        self._housekeeping.start()

    async def close(self) -> None:
        await self._housekeeping.close()
        await self._watch.close()
        await self._usage.close()
        await self._waking.close()
        await self._control.close()
        await self._pictures.close()
        await self.directory.close()
        if self._charging is not None:
            await self._charging.close()
        await self.ring.close()
        await self.database.close()

    @property
    def books(self) -> Books | None:
        """The ledger's side of this process, from `start` on; None while metering is off."""
        return None if self._charging is None else self._charging.books

    async def _settled(self) -> None:
        """Brings this worker's rows into the database, so that a caller finds its last request there."""
        if self._charging is not None:
            await self._charging.books.flush()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        exchange = Exchange(scope, send)
        scope[SCOPE_KEY] = exchange
        try:
            await self._entry(scope, receive, exchange.send)
        finally:
            status = exchange.status or CLIENT_GONE
            self.metrics.observe(exchange, status)
            if self._config.gateway.access_log:
                log_request(exchange, status)
            # They know each other, which only the garbage collector would notice, much later.
            del scope[SCOPE_KEY]

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except DatabaseError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; a failure ends here: as an envelope or, in mid-answer, a closed connection."""
        exchange: Exchange = scope[SCOPE_KEY]
        limit_s = self._config.gateway.request_timeout_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                await self._dispatch(exchange, receive, send)
            return
        except ClientGoneError:
            return
        except ApiError as error:
            # Without its frames, which hold the request's body and, by this name, the error itself.
            failure = error.with_traceback(None)
        except asyncio.CancelledError:
            # Only the stopping server cancels from outside, when its drain has lasted long enough. The task
            # ends with this answer, so the cancel need not go on.
            failure = _STOPPING
        except Exception as error:
            # The last line before the client: whatever else went wrong is told in the log alone.
            failure = self._unforeseen(exchange, limit_s if limit.expired() else None, error)
        if not exchange.begun:
            await send_error(send, failure)
        elif not exchange.complete and exchange.is_events:
            await send({"type": "http.response.body", "body": failure.event()})
        # Else the answer stays unfinished, on which the server closes the connection: a cut answer never
        # looks whole.

    def _unforeseen(self, exchange: Exchange, limit_s: float | None, error: Exception) -> ApiError:
        """What a client is told of a failure that is no ApiError; `limit_s` when its time was up."""
        if limit_s is not None and isinstance(error, TimeoutError):
            return _timed_out(exchange, limit_s)
        log.error("%s: unexpected failure", exchange.request_id, exc_info=error)
        return ApiError(
            500,
            "Something went wrong here; it is not your request. The operator finds it in the log as "
            f"{exchange.request_id}.",
            code="internal_error",
        )

    async def _dispatch(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        path: str = exchange.scope["path"]
        endpoint = ENDPOINTS.get(path)
        if endpoint is not None:
            exchange.endpoint = path
        origin = self._origins.of(exchange.scope)
        exchange.address = origin.shown
        admin = path.startswith("/admin/")
        if admin or (self._config.auth and path.startswith("/v1/")):
            given = exchange.headers.get(b"authorization")
            caller = authenticate(self.ring, given, origin.address)
            exchange.caller, exchange.key_id = caller, caller.key.id
            if self._charging is not None:
                exchange.standing = partial(self._charging.headers, caller)
            if admin:
                check_admin(caller)
        if endpoint is None:
            await self._pages(exchange.scope, receive, send)
            exchange.endpoint = _page_name(exchange)
            return
        method: str = exchange.scope["method"]
        if method != "POST":
            raise wrong_method(method, path, {"allow": "POST"})
        await self._forward(exchange, receive, send, endpoint)

    async def _forward(self, exchange: Exchange, receive: Receive, send: Send, endpoint: Endpoint) -> None:
        content_type = exchange.headers.get(b"content-type")
        as_form = endpoint.body == "multipart" or (endpoint.body == "either" and is_multipart(content_type))
        if not as_form:
            check_json_type(content_type)
        body = await read_body(receive, exchange, self._config.gateway.max_body_bytes)
        head = multipart_head(body, content_type) if as_form else json_head(body)
        served = self.directory.find(head.model)
        exchange.model, exchange.ask = served.route.id, head.ask
        if exchange.caller is not None:
            check_allowed(exchange.caller, served.route)
        served.check_open(None if exchange.caller is None else exchange.caller.tenant)
        check_category(endpoint, served.route)
        pictures = None
        if not as_form:
            body = _rewritten(body, endpoint, served.route)
            pictures = _pictures_of(endpoint, served.route)
        try:
            async with WhileClientWaits(receive, exchange):
                await self._check_context(exchange, served.route, endpoint, body)
                if self._charging is not None and not await self._charging.admitted(
                    exchange, send, served.route, body
                ):
                    return
                if pictures is not None:
                    # Before they are fetched: a request that has to wait for its model does so without them.
                    await self._waking.until_ready(exchange, served.route.id)
                    body = await self._pictures.settle(body, pictures)
                await self._forwarder.forward(exchange, send, served.route.id, endpoint.path, body)
        except ClientGoneError:
            ticket = exchange.ticket
            if ticket is not None and exchange.first_byte_s is not None and 200 <= exchange.status < 300:
                await ticket.settle("left")
            raise
        finally:
            if exchange.ticket is not None and not exchange.ticket.ended:
                await exchange.ticket.release()

    async def _check_context(
        self, exchange: Exchange, route: ModelRoute, endpoint: Endpoint, body: bytes
    ) -> None:
        """Holds a request to its plan's largest context.

        Raises:
            ApiError: 400 `context_length_exceeded`.
        """
        plan = exchange.caller.plan if exchange.caller is not None and self._charging is not None else None
        if plan is None or plan.spec.max_context is None or endpoint.path not in COUNTED:
            return
        served = await self._waking.until_ready(exchange, route.id)
        tenant = exchange.caller.tenant if exchange.caller is not None else None
        replicas = served.replicas(served.pool(tenant))
        if replicas:
            await check_context(body, plan.spec.max_context, route.id, replicas[0])

    def _make_upstream(self, id: str, address: str) -> Upstream:
        return Upstream(id, address, connect_timeout_s=self._config.gateway.connect_timeout_s)


def _rewritten(body: bytes, endpoint: Endpoint, route: ModelRoute) -> bytes:
    """The body to forward, but for its pictures: nearly always the very bytes that came.

    Raises:
        ApiError: 400 for what the model cannot take.
    """
    if endpoint.path == "/v1/completions":
        return fill_in_middle(body, route)
    if endpoint.path == "/v1/chat/completions" and _pictures_of(endpoint, route) is None:
        refuse_pictures(body, route)
    return body


def _pictures_of(endpoint: Endpoint, route: ModelRoute) -> PicturesOf | None:
    """Which kind of body may hold pictures here; None = none does."""
    if endpoint.path in ("/v1/detections", "/v1/detection"):
        return "detections"
    if endpoint.path == "/v1/chat/completions" and (
        route.category in ("vision", "detection") or "vision" in route.capabilities
    ):
        return "chat"
    return None


def _timed_out(exchange: Exchange, limit_s: float) -> ApiError:
    if not exchange.model:
        return ApiError(408, f"The request's body did not come within {limit_s:g} s.", code="request_timeout")
    return ApiError(
        504,
        f"'{exchange.model}' did not finish within {math.ceil(limit_s)} s. Ask for less at once, or have "
        "the operator raise gateway.request_timeout_s.",
        code="request_timeout",
    )


def _page_name(exchange: Exchange) -> str:
    """The metrics' name of a page: its route, never a path that a client made up."""
    route = exchange.scope.get("route")
    return str(getattr(route, "path", "other"))
