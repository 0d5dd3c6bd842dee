"""The HTTP server of one gateway process: uvicorn with uvloop and httptools around the application."""

from __future__ import annotations

import logging
import math
import socket

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.config import Config
from engine.errors import bad_request
from engine.gateway.app import Gateway

#: Longer than any usual client keeps an idle connection, so that it is the client who closes.
_IDLE_S = 75
_UNFINISHED = "returned without completing response"


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, whose answer to what is no HTTP is the envelope too."""

    def send_400_response(self, msg: str) -> None:
        body = bad_request(msg, code="invalid_http").body()
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()


def make_server(config: Config, gateway: Gateway) -> uvicorn.Server:
    """A server that has yet to be given its listening socket (`run(sockets=[…])`)."""
    return uvicorn.Server(
        uvicorn.Config(
            gateway,
            http=Protocol,
            loop="uvloop",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=max(1, math.ceil(config.gateway.drain_s)),
        )
    )


def listen(config: Config, fd: int | None) -> socket.socket:
    """The listening socket: one inherited from the scheduler, or a new one on the configured address.

    Raises:
        OSError: the fd is no socket, or the address cannot be bound.
    """
    if fd is not None:
        return socket.socket(fileno=fd)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    return socket.create_server((config.host, config.port), family=family, backlog=2048)


def set_up_logging(level: str) -> None:
    """Human-readable lines on standard error."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    for noisy in ("asyncio", "aiohttp", "filelock", "PIL", "python_multipart"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_not_unfinished)


def _not_unfinished(record: logging.LogRecord) -> bool:
    """An answer left unfinished on purpose (its runner has gone) is told by our own line."""
    return _UNFINISHED not in record.getMessage()
