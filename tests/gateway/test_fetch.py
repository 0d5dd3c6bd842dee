"""The fetch of remote pictures: what may be connected to, and the bounds of what comes back.

The local test server stands on 127.0.0.1. Tests of the address check hand in a `public` that calls 127.0.0.1
public and everything else (for instance 127.0.0.2, where the same server listens too) private.
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from engine.config import FetchConfig
from engine.errors import ApiError
from engine.gateway.fetch import Lookup, RemoteFetcher, parse_url, redirect_target, system_lookup
from engine.gateway.fetch_addresses import is_public

PARAM = "messages.[0].content.[1].image_url.url"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """A picture server on every loopback address, and what it was asked."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[web.Request] = []
        self.pages: dict[str, Handler] = {}

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def give(self, path: str, body: bytes = b"", status: int = 200, **headers: str) -> None:
        async def page(_: web.Request) -> web.StreamResponse:
            return web.Response(
                body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )

        self.pages[path] = page

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        return await self.pages[request.path](request)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    site.port = runner.addresses[0][1]
    await web.TCPSite(runner, "127.0.0.2", site.port).start()
    yield site
    await runner.cleanup()


async def fetch(
    url: str,
    *,
    config: FetchConfig | None = None,
    lookup: Lookup = system_lookup,
    public: Callable[[str], bool] = is_public,
) -> bytes:
    fetcher = RemoteFetcher(config or FetchConfig(allow_private=True), lookup=lookup, public=public)
    await fetcher.start()
    try:
        return await fetcher.fetch(url, param=PARAM)
    finally:
        await fetcher.close()


async def refusal(
    url: str,
    *,
    config: FetchConfig | None = None,
    lookup: Lookup = system_lookup,
    public: Callable[[str], bool] = is_public,
) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await fetch(url, config=config, lookup=lookup, public=public)
    assert caught.value.status == 400
    assert caught.value.param == PARAM
    return caught.value


def only_one(address: str) -> bool:
    return address == "127.0.0.1"


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "172.15.255.255",
        "172.32.0.0",
        "100.63.255.255",
        "2606:4700::1111",
        "2a00:1450:4001:80b::200e",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ],
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "240.0.0.1",
        "198.18.0.1",
        "203.0.113.7",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:1::1",
        "2001:db8::1",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1111%eth0",
        "fec0::1",
        "ff02::1",
        "100::1",
        "5f00::1",
        "localhost",
        "",
        "2130706433",
        "0177.0.0.1",
        "0x7f000001",
        "127.1",
        "8.8.8.8 ",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_a_wrapped_ipv4_address_counts_as_itself(address: ipaddress.IPv4Address) -> None:
    mapped = ipaddress.IPv6Address(int(ipaddress.IPv6Address("::ffff:0:0")) + int(address))
    nat64 = ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) + int(address))
    assert is_public(mapped) == is_public(nat64) == is_public(address) == is_public(str(address))


@given(st.ip_addresses())
def test_nothing_that_python_calls_special_is_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    # Python calls every wrapped IPv4 address reserved; those are judged by the test above.
    wrapped = address.version == 6 and any(
        address in ipaddress.ip_network(block) for block in ("::ffff:0:0/96", "64:ff9b::/96")
    )
    if is_public(address) and not wrapped:
        assert not (
            address.is_private
            or address.is_loopback
            or address.is_link_local
            or address.is_multicast
            or address.is_reserved
            or address.is_unspecified
        )


@given(
    st.sampled_from(
        ["10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "192.168.0.0/16", "fc00::/7", "2002::/16"]
    ),
    st.integers(min_value=0),
)
def test_no_address_of_a_closed_block_is_public(block: str, offset: int) -> None:
    network = ipaddress.ip_network(block)
    assert not is_public(network[offset % network.num_addresses])


@given(st.text(max_size=40))
def test_any_text_is_judged_without_an_exception(text: str) -> None:
    assert is_public(text) in (True, False)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "gopher://example.com/",
        "javascript:alert(1)",
        "//example.com/a.png",
        "example.com/a.png",
        "http://",
        "http:///a.png",
        "http://user:secret@example.com/a.png",
        "http://user@example.com/a.png",
        "http://exa mple.com/",
        "http://example.com/a\nb",
        "http://example.com\\@127.0.0.1/",
        "http://example.com:99999/",
        "http://[::1",
        "http://example.com/" + "a" * 9000,
        "",
    ],
)
def test_urls_that_are_refused_before_any_connection(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_url(url, param=PARAM)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_image_url", PARAM)


def test_a_refused_scheme_is_named() -> None:
    with pytest.raises(ApiError, match="'file'"):
        parse_url("file:///etc/passwd", param=PARAM)


def test_a_secret_in_the_url_is_not_echoed() -> None:
    with pytest.raises(ApiError) as caught:
        parse_url("http://user:secret@example.com/a.png", param=PARAM)
    assert "secret" not in caught.value.message


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_a_clear_error(text: str) -> None:
    try:
        assert parse_url(text, param=PARAM).scheme in ("http", "https")
    except ApiError as error:
        assert error.code == "invalid_image_url"


async def test_gives_the_bytes_and_sends_nothing_about_itself(site: Site) -> None:
    site.give("/a.png", b"bytes", Content_Type="text/html", Set_Cookie="a=b")
    assert await fetch(site.url("/a.png#part")) == b"bytes"
    headers = site.seen[0].headers
    assert "Cookie" not in headers and "Authorization" not in headers
    assert site.seen[0].path == "/a.png"


async def test_ignores_proxies_of_the_environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    site.give("/a.png", b"bytes")
    assert await fetch(site.url("/a.png")) == b"bytes"


async def test_keeps_no_cookie_between_fetches(site: Site) -> None:
    site.give("/a.png", b"bytes", Set_Cookie="a=b; Path=/")
    fetcher = RemoteFetcher(FetchConfig(allow_private=True), lookup=lambda _: ["127.0.0.1"])
    await fetcher.start()
    for _ in range(2):
        await fetcher.fetch(site.url("/a.png", "pictures.example"), param=PARAM)
    await fetcher.close()
    assert "Cookie" not in site.seen[1].headers


@pytest.mark.parametrize("status", [204, 206, 304, 403, 404, 500])
async def test_any_status_but_200_is_an_error_that_names_it(site: Site, status: int) -> None:
    site.give("/a.png", b"" if status in (204, 304) else b"no", status)
    error = await refusal(site.url("/a.png"))
    assert error.code == "image_fetch_failed" and str(status) in error.message


async def test_a_closed_port_is_an_error(site: Site) -> None:
    # Port 9 (discard) is not served on a test machine.
    error = await refusal("http://127.0.0.1:9/a.png")
    assert error.code == "image_fetch_failed" and "127.0.0.1" not in error.message


async def test_what_is_not_http_is_an_error() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert (await refusal(f"http://127.0.0.1:{port}/")).code == "image_fetch_failed"


async def test_a_body_cut_short_is_an_error(site: Site) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"few")
        assert request.transport is not None
        request.transport.close()
        return response

    site.pages["/a.png"] = cut
    assert (await refusal(site.url("/a.png"))).code == "image_fetch_failed"


async def test_too_large_by_its_own_word(site: Site) -> None:
    site.give("/a.png", b"x" * 101)
    config = FetchConfig(allow_private=True, max_bytes=100)
    error = await refusal(site.url("/a.png"), config=config)
    assert error.code == "image_too_large" and "100 bytes" in error.message
    site.give("/a.png", b"x" * 100)
    assert len(await fetch(site.url("/a.png"), config=config)) == 100


async def test_too_large_without_saying_so(site: Site) -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65536)
            sent += 65536

    site.pages["/a.png"] = endless
    error = await refusal(site.url("/a.png"), config=FetchConfig(allow_private=True, max_bytes=1_000_000))
    assert error.code == "image_too_large"
    assert sent < 20_000_000


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_bomb_is_stopped(site: Site, encoding: str) -> None:
    bomb = bytes(50_000_000)
    packed = gzip.compress(bomb) if encoding == "gzip" else zlib.compress(bomb)
    assert len(packed) < 100_000
    site.give("/a.png", packed, Content_Encoding=encoding)
    error = await refusal(site.url("/a.png"), config=FetchConfig(allow_private=True, max_bytes=100_000))
    assert error.code == "image_too_large"


async def test_a_compressed_picture_is_unpacked(site: Site) -> None:
    site.give("/a.png", gzip.compress(b"bytes"), Content_Encoding="gzip")
    assert await fetch(site.url("/a.png")) == b"bytes"


async def test_a_slow_server_is_left_in_time(site: Site) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.01)

    site.pages["/a.png"] = drip
    error = await refusal(site.url("/a.png"), config=FetchConfig(allow_private=True, timeout_s=0.1))
    assert error.code == "image_fetch_failed" and "0.1 s" in error.message


async def test_switched_off_it_takes_data_urls_only(site: Site) -> None:
    error = await refusal(site.url("/a.png"), config=FetchConfig(allow_private=True, enabled=False))
    assert error.code == "invalid_image_url" and "data: URL" in error.message
    assert site.seen == []


async def test_follows_redirects_to_their_end(site: Site) -> None:
    site.give("/1", status=302, Location="/2")
    site.give("/2", status=308, Location=site.url("/3"))
    site.give("/3", b"bytes")
    assert await fetch(site.url("/1")) == b"bytes"


async def test_one_redirect_too_many(site: Site) -> None:
    site.give("/1", status=301, Location="/2")
    site.give("/2", status=301, Location="/1")
    error = await refusal(site.url("/1"), config=FetchConfig(allow_private=True, max_redirects=3))
    assert error.code == "image_fetch_failed" and "3 times" in error.message
    assert len(site.seen) == 4


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("file:///etc/passwd", "invalid_image_url"),
        ("ftp://example.com/", "invalid_image_url"),
        ("data:image/png;base64,AAAA", "invalid_image_url"),
        ("http://a:b@127.0.0.1/", "invalid_image_url"),
        ("http://[", "image_fetch_failed"),
        ("", "image_fetch_failed"),
    ],
)
async def test_redirects_that_lead_nowhere(site: Site, location: str, code: str) -> None:
    site.give("/1", status=302, Location=location)
    assert (await refusal(site.url("/1"))).code == code


def test_a_redirect_keeps_the_transport_safe() -> None:
    source = URL("https://a.example/x/y?q=1")
    assert str(redirect_target(source, "../z", PARAM)) == "https://a.example/z"
    assert str(redirect_target(source, "//b.example/z", PARAM)) == "https://b.example/z"
    assert str(redirect_target(URL("http://a.example/"), "https://b.example/", PARAM)) == "https://b.example/"
    with pytest.raises(ApiError, match="https to http") as caught:
        redirect_target(source, "http://a.example/z", PARAM)
    assert caught.value.code == "image_fetch_failed"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "LOCALHOST.", "0x7f000001", "0.0.0.0"],
)
async def test_private_hosts_are_never_connected_to(site: Site, host: str) -> None:
    error = await refusal(site.url("/a.png", host), config=FetchConfig())
    assert error.code == "address_not_allowed"
    assert site.seen == []


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0177.0.0.1"])
async def test_numeric_spellings_of_loopback_are_refused(site: Site, host: str) -> None:
    error = await refusal(site.url("/a.png", host), config=FetchConfig())
    assert error.code in ("address_not_allowed", "invalid_image_url")
    assert site.seen == []


async def test_private_unknown_and_closed_hosts_answer_alike(site: Site) -> None:
    def unknown(_: str) -> list[str]:
        raise OSError("no such name")

    answers = [
        await refusal(site.url("/", "a.example"), config=FetchConfig(), lookup=lambda _: ["10.0.0.1"]),
        await refusal(site.url("/", "a.example"), config=FetchConfig(), lookup=lambda _: []),
        await refusal(site.url("/", "a.example"), config=FetchConfig(), lookup=unknown),
        await refusal("http://127.0.0.1:9/", config=FetchConfig()),
    ]
    assert len({(answer.code, answer.message) for answer in answers}) == 1


async def test_only_the_allowed_addresses_of_a_name_are_tried(site: Site) -> None:
    site.give("/a.png", b"bytes")
    url = site.url("/a.png", "pictures.example")
    addresses = ["10.0.0.1", "127.0.0.2", "127.0.0.1"]
    found = await fetch(url, config=FetchConfig(), lookup=lambda _: addresses, public=only_one)
    assert found == b"bytes"
    assert site.seen[0].host == f"pictures.example:{site.port}"


@pytest.mark.parametrize("target", ["127.0.0.2", "inside.example"])
async def test_a_redirect_to_a_private_address_is_refused(site: Site, target: str) -> None:
    site.give("/1", status=302, Location=site.url("/2", target))
    site.give("/2", b"secret")
    error = await refusal(
        site.url("/1"), config=FetchConfig(), lookup=lambda _: ["127.0.0.2"], public=only_one
    )
    assert error.code == "address_not_allowed"
    assert [request.path for request in site.seen] == ["/1"]


async def test_a_name_that_changes_its_address_gains_nothing(site: Site) -> None:
    asked: list[str] = []

    def rebinding(host: str) -> list[str]:
        asked.append(host)
        return ["127.0.0.1" if len(asked) == 1 else "127.0.0.2"]

    site.give("/a.png", b"bytes")
    url = site.url("/a.png", "turncoat.example")
    fetcher = RemoteFetcher(FetchConfig(), lookup=rebinding, public=only_one)
    await fetcher.start()
    assert await fetcher.fetch(url, param=PARAM) == b"bytes"
    assert asked == ["turncoat.example"], "checked and connected to the answer of one lookup"
    with pytest.raises(ApiError) as caught:
        await fetcher.fetch(url, param=PARAM)
    await fetcher.close()
    assert caught.value.code == "address_not_allowed"
    assert len(site.seen) == 1


async def test_the_socket_itself_refuses_what_the_resolver_let_through(site: Site) -> None:
    verdicts = iter([True, False])  # the resolver's check passes, the check of the connected address does not
    error = await refusal(
        site.url("/", "a.example"),
        config=FetchConfig(),
        lookup=lambda _: ["127.0.0.1"],
        public=lambda _: next(verdicts),
    )
    assert error.code == "address_not_allowed"
    assert site.seen == []


async def test_names_whose_lookup_hangs_do_not_outlive_the_time_limit() -> None:
    release = threading.Event()

    def hangs(_: str) -> list[str]:
        release.wait(5)
        return []

    error = await refusal("http://slow.example/", config=FetchConfig(timeout_s=0.05), lookup=hangs)
    release.set()
    assert error.code == "image_fetch_failed"
