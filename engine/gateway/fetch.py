"""Fetches remote pictures for the gateway, so that no runner ever opens a connection of a client's choosing.

The gateway may stand inside a private network, so an address is a weapon (server-side request forgery).
Two checks guard it. Names are resolved here, once per hop, and only public addresses are kept; and the
socket factory, which is handed the very address that the socket then connects to, refuses any other. A
name that changes its answer between check and use (DNS rebinding) therefore gains nothing. Redirects are
followed by hand, each hop checked anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from engine.config import FetchConfig
from engine.errors import ApiError, bad_request
from engine.gateway.fetch_addresses import is_public

#: Resolves a host name to numeric addresses; blocking; raises OSError when there are none.
Lookup = Callable[[str], list[str]]

_MAX_URL: Final = 8192
_CHUNK: Final = 64 * 1024
_CONNECTIONS: Final = 32
_LOOKUP_THREADS: Final = 8
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HEADERS: Final = {
    "User-Agent": "Hearth/0.1 (picture fetch)",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}


def system_lookup(host: str) -> list[str]:
    """The numeric addresses of ``host`` by the system's resolver (blocking).

    Raises:
        OSError: the name is not known, or the resolver does not answer.
    """
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def parse_url(url: str, *, param: str) -> URL:
    """The checked form of a picture's http or https address.

    Raises:
        ApiError: 400 ``invalid_image_url``: another scheme, no host, a user name in it, too long, no URL.
    """
    if len(url) > _MAX_URL:
        raise bad_request(
            f"The picture's URL has {len(url)} characters; at most {_MAX_URL} are taken.",
            param=param,
            code="invalid_image_url",
        )
    if any(char <= " " or char == "\x7f" or char == "\\" for char in url):
        raise bad_request(
            "The picture's URL holds a space, a control character or a backslash. Percent-encode it.",
            param=param,
            code="invalid_image_url",
        )
    try:
        parsed = URL(url)
        scheme, host, _ = parsed.scheme.lower(), parsed.host, parsed.port
    except ValueError as error:
        raise bad_request("The picture's URL is not valid.", param=param, code="invalid_image_url") from error
    if scheme not in ("http", "https"):
        raise bad_request(
            f"The scheme {scheme or '(none)'!r} is not taken for a picture's URL. "
            "Use http:, https: or a data: URL.",
            param=param,
            code="invalid_image_url",
        )
    if not host:
        raise bad_request("The picture's URL names no host.", param=param, code="invalid_image_url")
    if parsed.user is not None or parsed.password is not None:
        raise bad_request(
            "The picture's URL carries a user name or password, which is not taken. Leave it out, or send "
            "the picture as a data: URL.",
            param=param,
            code="invalid_image_url",
        )
    return parsed.with_fragment(None)


class _AddressRefusedError(OSError):
    """No address of the host may be connected to."""


class _CheckedResolver(AbstractResolver):
    """Keeps only the allowed addresses of a name, and looks names up in threads of its own.

    Threads of its own because a lookup cannot be cancelled: names whose server never answers would otherwise
    fill the default pool, which the rest of the gateway uses.
    """

    def __init__(self, lookup: Lookup, allowed: Callable[[str], bool]) -> None:
        self._lookup = lookup
        self._allowed = allowed
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="hearth-lookup")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.run_in_executor(self._threads, self._lookup, host)
        except (OSError, UnicodeError) as error:
            # The answer of a name with private addresses only: a client must not learn which names exist.
            raise _AddressRefusedError from error
        kept = [address for address in addresses if self._allowed(address)]
        if not kept:
            raise _AddressRefusedError
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in kept
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class RemoteFetcher:
    """Gets the bytes behind a picture's URL, within the bounds of :class:`~engine.config.FetchConfig`.

    Args:
        config: the bounds; ``allow_private`` lifts the check of addresses.
        lookup: resolves names; the system's resolver unless a test hands in another.
        public: tells public addresses from others.
    """

    def __init__(
        self,
        config: FetchConfig,
        *,
        lookup: Lookup = system_lookup,
        public: Callable[[str], bool] = is_public,
    ) -> None:
        self._config = config
        self._lookup = lookup
        self._public = public
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Opens the client session; called once, inside the running event loop."""
        connector = aiohttp.TCPConnector(
            resolver=_CheckedResolver(self._lookup, self._allowed),
            socket_factory=self._socket,
            use_dns_cache=False,
            force_close=True,  # hosts of pictures are strangers: no connection outlives its answer
            limit=_CONNECTIONS,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),  # one deadline over all hops, set in fetch()
            headers=_HEADERS,
        )

    async def close(self) -> None:
        """Closes the session and what is in flight on it."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def fetch(self, url: str, *, param: str) -> bytes:
        """The body behind ``url``, whatever content type it claims.

        Raises:
            ApiError: 400 with code ``invalid_image_url``, ``address_not_allowed``, ``image_too_large`` or
                ``image_fetch_failed``; ``param`` is handed through.
        """
        target = parse_url(url, param=param)
        if not self._config.enabled:
            raise bad_request(
                "This server does not fetch pictures from the network. Send the picture as a data: URL.",
                param=param,
                code="invalid_image_url",
            )
        try:
            async with asyncio.timeout(self._config.timeout_s):
                for _ in range(self._config.max_redirects + 1):
                    answer = await self._hop(target, param)
                    if isinstance(answer, bytes):
                        return answer
                    target = answer
        except TimeoutError as error:
            raise _failed(f"it took longer than {self._config.timeout_s:g} s", param) from error
        except _AddressRefusedError as error:
            raise self._refused(param) from error
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _AddressRefusedError):
                raise self._refused(param) from error
            raise _failed("its server could not be reached", param) from error
        except aiohttp.InvalidURL as error:
            raise bad_request(
                "The picture's URL is not valid.", param=param, code="invalid_image_url"
            ) from error
        except aiohttp.ClientError as error:
            raise _failed(
                "its server broke off or answered with something that is not HTTP", param
            ) from error
        raise _failed(f"it redirects more than {self._config.max_redirects} times", param)

    async def _hop(self, target: URL, param: str) -> bytes | URL:
        """One request: the body, or where its redirect points to."""
        assert self._session is not None, "start() comes first"
        # A numeric host never reaches the resolver; the socket factory would stop it too.
        if _is_numeric(target.host or "") and not self._allowed(target.host or ""):
            raise _AddressRefusedError
        async with self._session.get(target, allow_redirects=False) as response:
            if response.status in _REDIRECTS:
                return redirect_target(target, response.headers.get("Location"), param)
            if response.status != 200:
                raise _failed(f"its server answered {response.status}", param)
            if (response.content_length or 0) > self._config.max_bytes:
                raise self._too_large(param)
            body = bytearray()
            # Any content encoding is undone piece by piece, so this stops a compressed bomb as well.
            async for chunk in response.content.iter_chunked(_CHUNK):
                body += chunk
                if len(body) > self._config.max_bytes:
                    raise self._too_large(param)
            return bytes(body)

    def _allowed(self, address: str) -> bool:
        return self._config.allow_private or self._public(address)

    def _socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = info
        if not self._allowed(str(address[0])):
            raise _AddressRefusedError("address not allowed")
        return socket.socket(family, kind, protocol)

    def _refused(self, param: str) -> ApiError:
        if self._config.allow_private:
            return _failed("its host name could not be resolved", param)
        return bad_request(
            "The picture's URL (or one it redirects to) names a host without a public address. Check the "
            "name, or send the picture as a data: URL. The operator can allow private addresses with "
            "'allow_private = true' in [fetch].",
            param=param,
            code="address_not_allowed",
        )

    def _too_large(self, param: str) -> ApiError:
        return bad_request(
            f"The picture has more than {self._config.max_bytes} bytes, the most that is fetched. "
            "Send a smaller one.",
            param=param,
            code="image_too_large",
        )


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def redirect_target(source: URL, location: str | None, param: str) -> URL:
    """Where a redirect leads: checked like a client's URL, and never from https to http.

    Raises:
        ApiError: 400 ``image_fetch_failed`` or ``invalid_image_url``.
    """
    if not location:
        raise _failed("its server redirects without saying where", param)
    try:
        target = parse_url(str(source.join(URL(location))), param=param)
    except ValueError as error:
        raise _failed("its server redirects to something that is not a URL", param) from error
    if source.scheme == "https" and target.scheme == "http":
        raise _failed("it redirects from https to http, which is not followed", param)
    return target


def _failed(reason: str, param: str) -> ApiError:
    return bad_request(
        f"The picture could not be fetched: {reason}. Check the URL, or send the picture as a data: URL.",
        param=param,
        code="image_fetch_failed",
    )
