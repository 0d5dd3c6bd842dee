"""Bodies: only model and stream are read, and whatever comes is read or refused."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ApiError
from engine.gateway.body import check_json_type, json_head, parse_object
from engine.gateway.multipart import multipart_head

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(st.text(), values, max_size=5), st.text(min_size=1), st.sampled_from([True, False, None])
)
def test_model_and_stream_are_read_from_any_object(rest: dict[str, object], model: str, stream: bool) -> None:
    for ascii_ in (True, False):
        body = json.dumps({**rest, "model": model, "stream": stream}, ensure_ascii=ascii_).encode(
            "utf-8", "surrogatepass"
        )
        assert json_head(body)[:2] == (model, bool(stream))


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0model ').map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (
        json_head,
        parse_object,
        lambda body: multipart_head(body, b"multipart/form-data; boundary=XX"),
        lambda body: multipart_head(
            b"--XX\r\nContent-Disposition: form-data; " + body, b"multipart/form-data; boundary=XX"
        ),
        lambda body: multipart_head(body, b"multipart/form-data; " + body),
    ):
        try:
            read(data)
        except ApiError as error:
            assert error.status in (400, 415)


def test_a_body_of_5_mb_is_looked_at_in_milliseconds() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 1_000_000}], "model": "m"}).encode()
    best = min(_timed(body) for _ in range(10))
    # 1.5 ms where it was measured; the bound leaves room for a busy machine.
    assert best < 0.03


def _timed(body: bytes) -> float:
    before = time.perf_counter()
    assert json_head(body).model == "m"
    return time.perf_counter() - before


@pytest.mark.parametrize(
    "good", [None, b"", b"application/json", b"Application/JSON; charset=utf-8", b"application/x+json"]
)
def test_json_types(good: bytes | None) -> None:
    check_json_type(good)


@pytest.mark.parametrize("bad", [b"text/plain", b"application/x-www-form-urlencoded", b"\xff"])
def test_other_types(bad: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        check_json_type(bad)
    assert caught.value.status == 415
