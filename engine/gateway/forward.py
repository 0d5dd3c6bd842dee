"""Passes a request on to a replica and its answer back, as bytes."""

from __future__ import annotations

import logging

from engine.errors import ApiError
from engine.gateway.events import EventBuffer
from engine.gateway.exchange import Exchange, Send, send_error
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.normalise import normalised
from engine.gateway.routing import Directory, Served, not_ready
from engine.gateway.upstream import WHOLE_BYTES, Answer, Upstream, UpstreamLostError

log = logging.getLogger("hearth.gateway")

#: Headers of the request that a runner gets; keys and cookies stay here.
_PASSED_ON = (b"content-type", b"accept", b"traceparent", b"tracestate")
#: After a replica was lost: how long the scheduler is given to say what has become of it.
_NEWS_S = 0.5
#: An error's body is not longer, whatever a runner sends.
_MOST_ERROR_BYTES = 256 * 1024


class Forwarder:
    """Sends requests to the replicas of a directory."""

    def __init__(self, directory: Directory, metrics: GatewayMetrics) -> None:
        self._directory = directory
        self._metrics = metrics

    async def forward(self, exchange: Exchange, send: Send, served: Served, path: str, body: bytes) -> None:
        """Answers the request with what a replica of the model says.

        Raises:
            ApiError: 429 all replicas full; 503 none ready, or lost before anything had been sent to the
            client.
        """
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name in _PASSED_ON
            if (value := exchange.headers.get(name)) is not None
        }
        headers.setdefault("content-type", "application/json")
        headers["x-request-id"] = exchange.upstream_id
        failed: set[str] = set()
        stale: set[str] = set()
        while True:
            upstream = served.choose(failed)
            if upstream is None:
                raise await self._none_left(served, lost=bool(failed))
            upstream.taken()
            try:
                answer = await upstream.post(path, body, headers)
                try:
                    await self._pass_back(exchange, send, served, answer)
                finally:
                    answer.close()
                return
            except UpstreamLostError as error:
                self._note(exchange, served, upstream, error)
                if exchange.begun:
                    raise broken_off(served.route.id) from error
                if not error.unsent:
                    raise await self._lost(served) from error
                # An idle connection may be old while the replica lives: one more try there, then elsewhere.
                if upstream.address in stale:
                    failed.add(upstream.address)
                stale.add(upstream.address)
            finally:
                upstream.done()

    async def _pass_back(self, exchange: Exchange, send: Send, served: Served, answer: Answer) -> None:
        if answer.status >= 400:
            body = await answer.read(_MOST_ERROR_BYTES)
            await send_error(send, normalised(answer.status, body, answer.headers, served.route.id))
        elif answer.is_stream:
            await self._stream_events(exchange, send, served, answer)
        elif answer.length is not None and answer.length <= WHOLE_BYTES:
            body = await answer.read(WHOLE_BYTES)
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await self._stream_bytes(exchange, send, answer)

    async def _stream_bytes(self, exchange: Exchange, send: Send, answer: Answer) -> None:
        """A long body; when it breaks off, so does the connection, for a cut answer must not look whole."""
        chunks = answer.chunks()
        first = await anext(chunks, b"")
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _stream_events(self, exchange: Exchange, send: Send, served: Served, answer: Answer) -> None:
        """Server-sent events; a failure becomes a last event."""
        events = EventBuffer(served.route.id)
        chunks = answer.chunks()
        ready = b""
        while not ready:
            # The status is held back until there is an event: a replica lost before is a plain, retryable
            # 503.
            chunk = await anext(chunks, None)
            if chunk is None:
                break
            ready = events.feed(chunk)
        headers = [(name, value) for name, value in answer.headers if name != b"content-length"]
        exchange.is_events = True
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": ready, "more_body": True})
        try:
            async for chunk in chunks:
                if ready := events.feed(chunk):
                    await send({"type": "http.response.body", "body": ready, "more_body": True})
            await send({"type": "http.response.body", "body": events.rest()})
        except UpstreamLostError as error:
            log.error(
                "%s: the runner of %s broke off its stream: %s", exchange.request_id, served.route.id, error
            )
            self._metrics.lost(served.route.id)
            await send({"type": "http.response.body", "body": broken_off(served.route.id).event()})

    def _note(self, exchange: Exchange, served: Served, upstream: Upstream, error: UpstreamLostError) -> None:
        self._metrics.lost(served.route.id)
        log.warning("%s: replica %s was lost: %s", exchange.request_id, upstream.id, error)

    async def _lost(self, served: Served) -> ApiError:
        """The error for a replica that left with the request in hand."""
        error = await self._none_left(served, lost=True)
        return ApiError(
            503,
            f"The runner of '{served.route.id}' ended before it answered. {error.message}",
            code="runner_lost",
            headers=error.headers,
            extra=error.extra,
        )

    async def _none_left(self, served: Served, *, lost: bool) -> ApiError:
        """The error for a model without a replica, as of the newest table."""
        if lost:
            await self._directory.changed(_NEWS_S)
        try:
            route = self._directory.find(served.route.id).route
        except ApiError as gone:
            return gone
        return not_ready(route)


def broken_off(model: str) -> ApiError:
    """The last event of a stream whose runner has gone."""
    return ApiError(
        503,
        f"The runner of '{model}' ended before its answer was whole. What has come until here may be used; "
        "send the request again for a whole answer.",
        code="runner_lost",
    )
