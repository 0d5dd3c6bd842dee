"""Passes a request on to a replica and its answer back, as bytes."""

from __future__ import annotations

import logging
import re

from engine.errors import ApiError
from engine.gateway.events import EventBuffer
from engine.gateway.exchange import Exchange, Send, send_error
from engine.gateway.fair.gate import Gate, Place
from engine.gateway.firstbytes import FirstBytes
from engine.gateway.loading import not_ready
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.normalise import normalised
from engine.gateway.routing import Directory
from engine.gateway.tokens import tokens_of, tokens_of_events
from engine.gateway.upstream import WHOLE_BYTES, Answer, Upstream, UpstreamLostError
from engine.gateway.waking import Waking
from engine.metering.tenants import Tenant

log = logging.getLogger("hearth.gateway")

#: Headers of the request that a runner gets; keys and cookies stay here.
_PASSED_ON = (b"content-type", b"accept", b"traceparent", b"tracestate")
#: After a replica was lost: how long the scheduler is given to say what has become of it.
_NEWS_S = 0.5
#: An error's body is not longer, whatever a runner sends.
_MOST_ERROR_BYTES = 256 * 1024
#: The code of a runner's 503 when it sleeps.
_ASLEEP = "model_asleep"
#: Waits before a request is sent again to a model whose runner said that it sleeps, seconds: doubled.
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.02, 1.0


#: The event with which streams in OpenAI's format end; a text cannot hold it at a line's start.
_DONE = b"[DONE]"
_DONE_LINE = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)


class _AsleepError(Exception):
    """The replica sleeps, and has not begun the work."""


class Forwarder:
    """Sends requests to the replicas of a directory."""

    def __init__(
        self,
        directory: Directory,
        metrics: GatewayMetrics,
        waking: Waking,
        first_bytes: FirstBytes,
        gate: Gate,
    ) -> None:
        self._directory = directory
        self._metrics = metrics
        self._waking = waking
        self._first_bytes = first_bytes
        self._gate = gate

    async def forward(self, exchange: Exchange, send: Send, model: str, path: str, body: bytes) -> None:
        """Answers the request, when it is its turn, with what a replica of the model (its id) says.

        Raises:
            ApiError: 429 too many wait, or all replicas are full; 503 none ready and not to be waited for
            (any longer), its turn did not come in time, or lost before anything had been sent to the client.
        """
        place = self._gate.place(exchange)
        try:
            await self._forward(exchange, send, model, path, body, place)
        finally:
            place.leave()

    async def _forward(
        self, exchange: Exchange, send: Send, model: str, path: str, body: bytes, place: Place
    ) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name in _PASSED_ON
            if (value := exchange.headers.get(name)) is not None
        }
        headers.setdefault("content-type", "application/json")
        headers["x-request-id"] = exchange.upstream_id
        tenant = exchange.caller.tenant if exchange.caller is not None else None
        without: set[str] = set()
        stale: set[str] = set()
        lost = False
        asleep_at: int | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            if not place.enter(self._directory.find(model), without, len(body)):
                await place.turn()
            # Nothing is awaited from this look at the table in force until the request is counted (`taken`):
            # the scheduler puts a replica to sleep once this worker has acknowledged a table without it
            # and reported nothing in flight there, and no request may slip in between.
            upstream = self._directory.find(model).choose_in(place.pool, without)
            if upstream is None:
                # Who waits for a model to wake keeps no place from others.
                place.step_back()
                if lost and asleep_at is None:
                    await self._news_of_lost(model, tenant)
                lost = False
                await self._waking.until_ready(
                    exchange, model, asleep_at=asleep_at, pause_s=pause_s if asleep_at is not None else 0.0
                )
                if asleep_at is not None:
                    asleep_at, pause_s = None, min(pause_s * 2, _MOST_PAUSE_S)
                without.clear()
                continue
            upstream.taken()
            try:
                with self._metrics.in_flight(model).track_inprogress():
                    await self._send(exchange, send, model, upstream, path, body, headers)
                return
            except UpstreamLostError as error:
                self._metrics.lost(model)
                log.warning("%s: replica %s was lost: %s", exchange.request_id, upstream.id, error)
                if exchange.begun:
                    raise broken_off(model) from error
                if not error.unsent:
                    raise await self._lost(model, tenant) from error
                # An idle connection may be old while the replica lives: one more try there, then elsewhere.
                if upstream.address in stale:
                    without.add(upstream.address)
                    lost = True
                stale.add(upstream.address)
            except _AsleepError:
                log.info("%s: replica %s sleeps; the request waits", exchange.request_id, upstream.id)
                without.add(upstream.address)
                asleep_at = self._directory.version
            finally:
                upstream.done()

    async def _send(
        self,
        exchange: Exchange,
        send: Send,
        model: str,
        upstream: Upstream,
        path: str,
        body: bytes,
        headers: dict[str, str],
    ) -> None:
        """Sends the request to this replica and its answer to the client.

        Raises:
            UpstreamLostError: the replica was lost.
            _AsleepError: it sleeps; nothing has been sent to the client.
        """
        sent_at_s = exchange.elapsed_s()
        answer = await upstream.post(path, body, headers)
        try:
            if answer.status >= 400:
                said = await answer.read(_MOST_ERROR_BYTES)
                error = normalised(answer.status, said, answer.headers, model)
                if error.status == 503 and error.code == _ASLEEP:
                    raise _AsleepError
                await send_error(send, error)
            elif answer.is_stream:
                # How long an owned replica takes says nothing of the shared ones, whose number follows it.
                shared = upstream.owner is None
                await self._stream_events(exchange, send, model, answer, sent_at_s if shared else None)
            elif answer.length is not None and answer.length <= WHOLE_BYTES:
                body = await answer.read(WHOLE_BYTES)
                await settle(exchange, answer, body)
                await send(
                    {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
                )
                await send({"type": "http.response.body", "body": body})
            else:
                await self._stream_bytes(exchange, send, answer)
        finally:
            answer.close()

    async def _stream_bytes(self, exchange: Exchange, send: Send, answer: Answer) -> None:
        """A long body; when it breaks off, so does the connection, for a cut answer must not look whole."""
        chunks = answer.chunks()
        chunk = await anext(chunks, b"")
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        left = answer.length
        while chunk:
            if left is not None:
                left -= len(chunk)
                if left <= 0:
                    # With these bytes the answer is whole for its client.
                    await settle(exchange, answer)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await anext(chunks, b"")
        await settle(exchange, answer)
        await send({"type": "http.response.body", "body": b""})

    async def _stream_events(
        self, exchange: Exchange, send: Send, model: str, answer: Answer, sent_at_s: float | None
    ) -> None:
        """Server-sent events; a failure becomes a last event. `sent_at_s` None: its wait does not count."""
        events = EventBuffer(model)
        chunks = answer.chunks()
        ready = b""
        while not ready:
            # The status is held back until there is an event: a replica lost before is a plain, retryable
            # 503.
            chunk = await anext(chunks, None)
            if chunk is None:
                break
            ready = events.feed(chunk)
        if sent_at_s is not None:
            self._first_bytes.add(model, exchange.elapsed_s() - sent_at_s)
        headers = [(name, value) for name, value in answer.headers if name != b"content-length"]
        exchange.is_events = True
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        try:
            await self._pass_on(exchange, send, answer, ready, events.failed)
            async for chunk in chunks:
                if ready := events.feed(chunk):
                    await self._pass_on(exchange, send, answer, ready, events.failed)
            await settle(exchange, answer)
            await send({"type": "http.response.body", "body": events.rest()})
        except UpstreamLostError as error:
            log.error("%s: the runner of %s broke off its stream: %s", exchange.request_id, model, error)
            self._metrics.lost(model)
            await send({"type": "http.response.body", "body": broken_off(model).event()})

    async def _pass_on(
        self, exchange: Exchange, send: Send, answer: Answer, events: bytes, failed: bool
    ) -> None:
        """Sends whole events; recorded before the one that clients take for the last.

        An answer whose runner tells of a failure is not charged.
        """
        ticket = exchange.ticket
        if ticket is not None:
            ticket.tokens = tokens_of_events(events, ticket.tokens)
            if failed:
                await ticket.release()
        if _DONE in events and _DONE_LINE.search(events):
            await settle(exchange, answer)
        await send({"type": "http.response.body", "body": events, "more_body": True})

    async def _lost(self, model: str, tenant: Tenant | None) -> ApiError:
        """The error for a replica that left with the request in hand, as of the newest table."""
        await self._directory.changed(_NEWS_S)
        try:
            served = self._directory.find(model)
        except ApiError as gone:
            return gone
        pool = served.owner(tenant)
        error = not_ready(served.route_of(pool), elapsed_s=self._directory.elapsed_s(model, pool))
        return ApiError(
            503,
            f"The runner of '{model}' ended before it answered. {error.message}",
            code="runner_lost",
            headers=error.headers,
            extra=error.extra,
        )

    async def _news_of_lost(self, model: str, tenant: Tenant | None) -> None:
        """Gives the scheduler a moment to say what has become of the lost replicas.

        Raises:
            ApiError: 503 while the table knows no better.
        """
        await self._directory.changed(_NEWS_S)
        served = self._directory.find(model)
        pool = served.pool(tenant)
        if served.replicas(pool):
            raise not_ready(served.route_of(pool), elapsed_s=self._directory.elapsed_s(model, pool))


async def settle(exchange: Exchange, answer: Answer, body: bytes | None = None) -> None:
    """Records the answered request before its last byte goes out; `body` where it is whole.

    Raises:
        ApiError: 503 `ledger_unavailable`.
    """
    ticket = exchange.ticket
    if ticket is None:
        return
    if body is not None and answer.content_type.startswith(b"application/json"):
        ticket.tokens = tokens_of(body)
    await ticket.settle(status=answer.status, headers=answer.headers, body=body)


def broken_off(model: str) -> ApiError:
    """The last event of a stream whose runner has gone."""
    return ApiError(
        503,
        f"The runner of '{model}' ended before its answer was whole. What has come until here may be used; "
        "send the request again for a whole answer.",
        code="runner_lost",
    )
