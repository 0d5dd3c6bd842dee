"""Where a request comes from: its peer, or, behind trusted proxies, whom these name in `X-Forwarded-For`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

#: More proxies than this in a row are no honest chain; the bound keeps a forged header cheap.
_MOST_HOPS = 32


@dataclass(frozen=True, slots=True)
class Origin:
    """A caller's address."""

    #: For the log: the caller's, or the peer's where the caller's cannot be told; '-' on a Unix socket.
    shown: str
    #: The caller's; None where it cannot be told, which no restriction to addresses lets through.
    address: str | None


class Origins:
    """Tells callers' addresses; `trusted` are the proxies' addresses or networks."""

    def __init__(self, trusted: Iterable[str]) -> None:
        """Takes what `gateway.trusted_proxies` holds, which the configuration has checked."""
        self._trusted = tuple(ip_network(each) for each in trusted)

    def of(self, scope: Mapping[str, Any]) -> Origin:
        """The caller of an ASGI request.

        Each proxy appends the address that it was called from, so the header is read from its right end: the
        first address that is no trusted proxy's is the caller's; what stands left of it anybody may have
        written. Where all are trusted it is the left-most.
        """
        client = scope.get("client")
        peer: str | None = client[0] if client else None
        if not self._trusted or peer is None:
            return Origin(peer or "-", peer)
        own = _address(peer)
        if own is None or not self._trusts(own):
            return Origin(peer, peer)
        # A header that came several times is one list.
        given = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        if not given:
            # The proxy itself, for instance its health checks.
            return Origin(peer, peer)
        hops = b",".join(given).decode("latin-1").rsplit(",", _MOST_HOPS)
        for number, hop in enumerate(reversed(hops)):
            found = _address(hop.strip(" \t")) if number < _MOST_HOPS else None
            if found is None:
                return Origin(peer, None)
            if not self._trusts(found):
                break
        return Origin(str(found), str(found))

    def _trusts(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._trusted)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address, as proxies write it: also with a port, IPv6 then in brackets; None = it is none."""
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not _is_port(port)):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(f":{port}"):
            return None
    try:
        # A zone ('%eth0') means something on one machine alone, and may hold anything.
        found = ip_address("" if "%" in text else text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _is_port(text: str) -> bool:
    return text.startswith(":") and text[1:].isascii() and text[1:].isdigit() and len(text) <= 6
