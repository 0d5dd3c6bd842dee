"""One line a request, for a person and for grep."""

from __future__ import annotations

import logging

from engine.gateway.exchange import Exchange

access = logging.getLogger("hearth.access")

_MOST_PATH = 120
#: Asked for by machines every few seconds: no news while they answer as they should.
_POLLED = frozenset({"/health", "/ready", "/metrics"})


def log_request(exchange: Exchange, status: int) -> None:
    """Writes the line: what was asked, how it ended, times to the first byte and in all, bytes in and out."""
    scope = exchange.scope
    level = logging.DEBUG if exchange.endpoint in _POLLED and status in (200, 503) else logging.INFO
    if not access.isEnabledFor(level):
        return
    first = "-" if exchange.first_byte_s is None else f"{exchange.first_byte_s * 1000:.1f}"
    access.log(
        level,
        "%s %s %s model=%s first=%sms total=%.1fms in=%d out=%d from=%s key=%s id=%s",
        status,
        scope["method"],
        printable(scope["path"]),
        exchange.model or "-",
        first,
        exchange.elapsed_s() * 1000,
        exchange.bytes_in,
        exchange.bytes_out,
        exchange.address,
        exchange.key_id,
        exchange.request_id,
    )


def printable(path: str) -> str:
    """A path that cannot break a log line, whatever a client has sent."""
    shown = path if len(path) <= _MOST_PATH else path[:_MOST_PATH] + "…"
    return shown if shown.isprintable() and " " not in shown else ascii(shown)
