"""Whom a request is taken to come from, with and without proxies; the last tests over sockets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Config, ConfigError, load
from engine.gateway.origin import Origin, Origins
from engine.metering import keys
from engine.metering.keys import Allowed
from engine.metering.opening import opened
from tests.gateway.dummy import DummyRunner, open_house, route

CHAT = "/v1/chat/completions"


def scope(peer: str | None, *forwarded: str) -> dict[str, Any]:
    return {
        "client": None if peer is None else (peer, 4711),
        "headers": [(b"host", b"x"), *((b"x-forwarded-for", each.encode("latin-1")) for each in forwarded)],
    }


@pytest.mark.parametrize(
    ("peer", "forwarded", "caller"),
    [
        # Nobody's word is taken but a proxy's.
        ("8.8.8.8", ["1.2.3.4"], "8.8.8.8"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        # The right-most that is no proxy: what stands left of it the caller may have written.
        ("10.0.0.1", ["10.0.0.9, 6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4, 10.0.0.7,10.9.9.9"], "1.2.3.4"),
        ("10.0.0.1", ["rubbish, 1.2.3.4"], "1.2.3.4"),
        # A proxy that adds a line of its own to the caller's.
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        # All of them proxies: the first of the chain.
        ("10.0.0.1", ["10.0.0.5, 10.0.0.6"], "10.0.0.5"),
        ("10.0.0.1", ["1.2.3.4:51000"], "1.2.3.4"),
        ("10.0.0.1", ["[2001:db8::7]:443"], "2001:db8::7"),
        ("10.0.0.1", ["[2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", ["2001:DB8::7"], "2001:db8::7"),
        ("10.0.0.1", ["::ffff:1.2.3.4"], "1.2.3.4"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("fd00::1", ["1.2.3.4, ::ffff:10.0.0.3"], "1.2.3.4"),
    ],
)
def test_the_right_most_address_that_is_no_proxys(peer: str, forwarded: list[str], caller: str) -> None:
    assert Origins(["10.0.0.0/8", "fd00::1/128"]).of(scope(peer, *forwarded)) == Origin(caller, caller)


@pytest.mark.parametrize(
    "forwarded",
    [
        "",
        "unknown",
        "1.2.3.4, unknown",
        "1.2.3.4,",
        "1.2.3.4:http",
        "1.2.3.4:1234567",
        "[2001:db8::7",
        "[2001:db8::7]x",
        "fe80::1%eth0",
        "1.2.3.4.5",
        "\xff",
        ", ".join(["1.2.3.4", *["10.0.0.1"] * 40]),
    ],
)
def test_of_a_malformed_header_the_peer_is_shown_and_nothing_believed(forwarded: str) -> None:
    assert Origins(["10.0.0.0/8"]).of(scope("10.0.0.1", forwarded)) == Origin("10.0.0.1", None)


def test_without_proxies_the_header_says_nothing() -> None:
    assert Origins([]).of(scope("10.0.0.1", "1.2.3.4")) == Origin("10.0.0.1", "10.0.0.1")
    assert Origins(["10.0.0.0/8"]).of(scope(None, "1.2.3.4")) == Origin("-", None)


@given(st.lists(st.text(st.characters(max_codepoint=255), max_size=40), max_size=4))
def test_no_header_makes_it_fail_or_breaks_a_log_line(forwarded: list[str]) -> None:
    found = Origins(["10.0.0.0/8"]).of(scope("10.0.0.1", *forwarded))
    assert found.shown.isprintable() and " " not in found.shown
    assert found.address in (None, found.shown)


def test_networks_of_proxies_are_checked_by_the_configuration(tmp_path: Path) -> None:
    config = Config(gateway={"trusted_proxies": [" 10.1.2.3/8", "::1"]})
    assert config.gateway.trusted_proxies == ["10.0.0.0/8", "::1/128"]
    file = tmp_path / "h.toml"
    for wrong, told in (("10.0.0.300", "10.0.0.300"), ("0.0.0.0/0", "every caller"), ("proxy", "proxy")):
        file.write_text(f'[gateway]\ntrusted_proxies = ["{wrong}"]\n')
        with pytest.raises(ConfigError, match=told) as caught:
            load(file)
        assert "gateway.trusted_proxies" in str(caught.value)


async def test_a_keys_addresses_are_held_against_the_caller_behind_the_proxy(
    short: Path, tmp_path: Path, runner: DummyRunner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hearth.access")
    proxied = {"trusted_proxies": ["127.0.0.0/8"]}
    async with open_house(tmp_path, route("dummy", runner), gateway=proxied) as house:
        async with opened(house.config) as database:
            key, _ = await keys.create(database, allowed=Allowed(addresses=("203.0.113.0/24",)))
            own, _ = await keys.create(database, name="own", allowed=Allowed(addresses=("127.0.0.1",)))
        await house.gateway.ring.refresh()

        async def ask(key: str, forwarded: str | None) -> tuple[int, str]:
            headers = {"authorization": f"Bearer {key}"}
            if forwarded is not None:
                headers["x-forwarded-for"] = forwarded
            status, answer, _ = await house.post(CHAT, {"model": "dummy", "messages": []}, headers=headers)
            return status, "" if status == 200 else f"{answer['error']['code']}: {answer['error']['message']}"

        assert await ask(key, "203.0.113.9") == (200, "")
        assert "from=203.0.113.9 key=" in caplog.text
        status, told = await ask(key, "203.0.113.9, 198.51.100.1")
        assert status == 403 and told.startswith("address_not_allowed") and "198.51.100.1" in told
        assert (await ask(key, None))[0] == 403
        assert await ask(own, None) == (200, "")
        status, told = await ask(own, "nonsense")
        assert status == 403 and "X-Forwarded-For is malformed" in told
        assert "from=127.0.0.1" in caplog.text
        unrestricted, _, _ = await house.post(
            CHAT, {"model": "dummy", "messages": []}, headers={"x-forwarded-for": "nonsense"}
        )
        assert unrestricted == 200


async def test_without_a_trusted_proxy_nobody_borrows_an_address(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with open_house(tmp_path, route("dummy", runner)) as house:
        async with opened(house.config) as database:
            key, _ = await keys.create(database, allowed=Allowed(addresses=("203.0.113.0/24",)))
        await house.gateway.ring.refresh()
        headers = {"authorization": f"Bearer {key}", "x-forwarded-for": "203.0.113.9"}
        status, answer, _ = await house.post(CHAT, {"model": "dummy", "messages": []}, headers=headers)
        assert status == 403 and "127.0.0.1" in answer["error"]["message"]
