"""The TCP sockets that gateway workers accept on: bound here, inherited by the workers.

One socket a worker, all on one port (``SO_REUSEPORT``), so that the kernel spreads connections evenly. The
scheduler keeps its copies open: while a worker is started again, connections to its socket wait instead of
being refused.
"""

from __future__ import annotations

import errno
import socket

import psutil

_BACKLOG = 2048


class ListenError(Exception):
    """The address cannot be listened on; the message says what holds it and what to do."""


class Listeners:
    """The sockets of all workers, made when first asked for."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        #: The port in use; that of the configuration until one was bound or taken over.
        self.port = port
        self._sockets: dict[int, socket.socket] = {}

    @property
    def url(self) -> str:
        """Where the gateways answer, without a path; for clients on this machine."""
        return f"http://{reachable_host(self.host)}:{self.port}"

    def open(self, index: int, *, shared: bool) -> socket.socket:
        """The socket of worker ``index``.

        Args:
            shared: workers of ours hold the port already; otherwise it must be free.

        Raises:
            ListenError: the address cannot be bound.
        """
        if index not in self._sockets:
            if self.port and not (shared or self._sockets):
                self._refuse_taken()
            self._sockets[index] = self._bind(reuse_port=True)
        return self._sockets[index]

    def _refuse_taken(self) -> None:
        # With SO_REUSEPORT a second Hearth of the same user would share the port instead of failing.
        self._bind(reuse_port=False).close()

    def _bind(self, *, reuse_port: bool) -> socket.socket:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            raise ListenError(
                f"'{self.host}' is no address of this machine ({error}). "
                "Set `host` to 127.0.0.1 (this machine only) or 0.0.0.0 (all)."
            ) from error
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.setblocking(False)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise ListenError(self._explain(error)) from error
        if reuse_port:
            self.port = sock.getsockname()[1]
        return sock

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE:
            return (
                f"port {self.port} on {self.host} is taken{_holder(self.port)}. Stop that, or choose another "
                f"port: HEARTH_PORT={self.port + 1} (or `port` in hearth.toml; 0 = any free one)."
            )
        if error.errno == errno.EACCES:
            return (
                f"port {self.port} needs more rights than this user has. "
                "Choose one above 1023: HEARTH_PORT=8000."
            )
        return f"{self.host}:{self.port} cannot be listened on: {error.strerror}. Check `host` and `port`."

    def release(self, index: int) -> None:
        """Closes our copy of a worker's socket: nobody will accept on it any more."""
        sock = self._sockets.pop(index, None)
        if sock:
            sock.close()

    def close(self) -> None:
        """Refuses what comes from now on, as far as no worker listens."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()


def _holder(port: int) -> str:
    """' by NAME (pid N)' where this user may see who listens on the port."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
        if listens and connection.pid:
            try:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.Error:
                return f" by pid {connection.pid}"
    return ""


def reachable_host(host: str) -> str:
    """The host to write into a URL for this machine: an address, where ``host`` means 'all'."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
