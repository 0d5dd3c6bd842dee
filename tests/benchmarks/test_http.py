"""The benchmarks' own HTTP: messages are counted right however the bytes are cut; faults are not hidden."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks._http import Load, Messages, Responder, drive, request

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@given(st.lists(st.binary(max_size=30), max_size=6), st.lists(st.integers(1, 40), max_size=20))
def test_messages_are_counted_however_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    data = b"".join(request("/p", body, **{"X-Name": "y"}) for body in bodies)
    messages, counted = Messages(), 0
    for cut in [*cuts, len(data)]:
        counted += messages.feed(data[:cut])
        data = data[cut:]
    assert counted == len(bodies)


def test_a_message_without_a_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="Content-Length"):
        Messages().feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")


def test_rates_and_percentiles() -> None:
    load = Load(seconds=2.0, latencies=[i / 1000 for i in range(100, 0, -1)])
    assert load.per_second == 50
    assert load.percentile_ms(0.5) == pytest.approx(51)
    assert load.percentile_ms(0.99) == pytest.approx(100)
    assert load.percentile_ms(1.0) == pytest.approx(100)


async def test_a_load_ends_after_its_most_requests(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = await asyncio.get_running_loop().create_unix_server(lambda: Responder(ANSWER), str(path))
    async with server:
        load = await drive(path, request("/p", b"x" * 100_000), callers=3, seconds=30, most=50)
    assert 50 <= len(load.latencies) <= 52
    assert all(latency > 0 for latency in load.latencies)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", b""])
async def test_a_load_does_not_count_failures(tmp_path: Path, answer: bytes) -> None:
    class Closing(Responder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            assert self._transport is not None
            self._transport.close()

    path = tmp_path / "s"
    server = await asyncio.get_running_loop().create_unix_server(lambda: Closing(answer), str(path))
    async with server:
        with pytest.raises(RuntimeError, match=r"answered|closed"):
            await drive(path, request("/p", b"x"), callers=1, seconds=5, most=5)
