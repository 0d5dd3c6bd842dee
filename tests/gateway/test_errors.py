"""Every failure is OpenAI's envelope with the right status, type, param and code."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.dummy import KEY, DummyRunner, House, open_house, route

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def check(
    body: Any, *, type: str = "invalid_request_error", param: str | None = None, code: str | None
) -> str:
    """The envelope is whole and says this; its message."""
    error = body["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (type, param, code)
    assert isinstance(error["message"], str) and error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("body", "param", "code", "said"),
    [
        (b"", None, "invalid_json", "no body"),
        (b"{", None, "invalid_json", "line 1, column 2"),
        (b'{"model": "dummy",}', None, "invalid_json", "line 1"),
        (b"[1]", None, "invalid_json", "JSON object"),
        (b'"text"', None, "invalid_json", "JSON object"),
        (b"\xff\xfe{}", None, "invalid_encoding", "byte 0"),
        (b'{"model": "dummy", "x": "\xe4"}', None, "invalid_encoding", "byte 25"),
        (b"{}", "model", "missing_required_parameter", "names no model"),
        (b'{"model": null}', "model", "missing_required_parameter", "names no model"),
        (b'{"model": 7}', "model", "invalid_type", "not a number"),
        (b'{"model": ["a"]}', "model", "invalid_type", "not an array"),
        (b'{"model": "dummy", "stream": "yes"}', "stream", "invalid_type", "not a string"),
        (b'{"a":' + b"[" * 100_000, None, "invalid_json", "nested too deeply"),
    ],
)
async def test_a_body_that_cannot_be_read(
    house: House, runner: DummyRunner, body: bytes, param: str | None, code: str, said: str
) -> None:
    status, answer, _ = await house.post(CHAT, data=body, headers=JSON)
    assert status == 400
    assert said in check(answer, param=param, code=code)
    assert not runner.seen


async def test_an_unknown_model_is_a_404_with_the_nearest_names(house: House) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await house.openai.chat.completions.create(model="dumy", messages=[])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "Did you mean 'dummy'?" in caught.value.message


async def test_a_wrong_category_names_the_right_endpoint(house: House, runner: DummyRunner) -> None:
    house.serve(route("vectors", runner, category="embedding"), route("coder", runner, category="code"))
    status, body, _ = await house.post(CHAT, {"model": "vectors", "messages": []})
    assert status == 400
    assert "POST /v1/embeddings" in check(body, param="model", code="wrong_category")
    status, body, _ = await house.post(CHAT, {"model": "coder", "messages": []})
    assert "POST /v1/completions" in check(body, param="model", code="wrong_category")
    house.serve(route("coder", runner, category="code", capabilities=["chat"]))
    assert (await house.post(CHAT, {"model": "coder", "messages": []}))[0] == 200


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        ("/v1/chat/completions", {"chat", "vision", "detection"}),
        ("/v1/completions", {"chat", "code"}),
        ("/v1/embeddings", {"embedding"}),
        ("/v1/images/generations", {"image"}),
        ("/v1/detections", {"detection"}),
        ("/v1/detection", {"detection"}),
    ],
)
async def test_each_endpoint_serves_its_categories(
    house: House, runner: DummyRunner, path: str, fits: set[str]
) -> None:
    for category in ("chat", "code", "vision", "image", "audio", "embedding", "detection"):
        house.serve(route("it", runner, category=category))
        _, body, _ = await house.post(path, {"model": "it"})
        refused = body.get("error", {}).get("code") == "wrong_category"
        assert refused == (category not in fits)


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, "Bearer wrong", f"Bearer {KEY}x", "Bearer \xe4"],
)
async def test_a_bad_key_is_a_401(house: House, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
        async with house.http.request(method, house.base + path, headers=headers) as response:
            assert response.status == 401
            message = check(await response.json(), type="authentication_error", code="invalid_api_key")
            assert KEY not in message
            assert response.headers["x-request-id"]


async def test_the_openai_client_sees_an_authentication_error(house: House) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await house.openai.with_options(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"


async def test_without_auth_no_key_is_asked_for(tmp_path: Path, runner: DummyRunner) -> None:
    async with (
        open_house(tmp_path, route("dummy", runner), auth=False) as house,
        house.http.post(house.base + CHAT, json={"model": "dummy"}) as response,
    ):
        assert response.status == 200


async def test_a_body_too_large_is_a_413(tmp_path: Path, runner: DummyRunner) -> None:
    async with open_house(tmp_path, route("dummy", runner), gateway={"max_body_bytes": 2048}) as house:
        status, body, _ = await house.post(CHAT, data=b"x" * 4096, headers=JSON)
        assert status == 413
        check(body, code="request_too_large")

        async def pieces():  # type: ignore[no-untyped-def]  # an async generator of bytes
            for _ in range(8):
                yield b"x" * 512

        status, body, _ = await house.post(CHAT, data=pieces(), headers=JSON)
        assert status == 413
        check(body, code="request_too_large")
        # The connection is not spoilt for the next request.
        assert (await house.post(CHAT, {"model": "dummy"}))[0] == 200


async def test_what_is_not_json_or_is_compressed_is_a_415(house: House) -> None:
    status, body, _ = await house.post(CHAT, data=b"a=b", headers={"content-type": "text/plain"})
    assert status == 415
    check(body, code="unsupported_media_type")
    status, body, _ = await house.post(CHAT, data=b"{}", headers={**JSON, "content-encoding": "gzip"})
    assert status == 415
    check(body, code="unsupported_content_encoding")


async def test_unknown_paths_and_methods(house: House) -> None:
    status, body, _ = await house.post("/v1/chat/completion", {})
    assert status == 404
    assert "/v1/chat/completions" in check(body, code="unknown_url")
    status, body, _ = await house.post("/chat/completions", {})
    assert "Did you mean /v1/chat/completions?" in check(body, code="unknown_url")
    status, text, headers = await house.get(CHAT)
    assert (status, headers["allow"]) == (405, "POST")
    check(json.loads(text), code="method_not_allowed")
    status, body, headers = await house.post("/v1/models", {})
    assert status == 405 and "GET" in headers["allow"]
    check(body, code="method_not_allowed")


async def test_what_is_no_http_is_answered_in_the_envelope(house: House) -> None:
    host, port = house.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"NONSENSE\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 2)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    check(json.loads(body), code="invalid_http")


async def test_a_model_that_is_not_ready_says_so(house: House) -> None:
    house.serve(route("dummy", state="warming", reason="loads weights\n/inside/of/the/machine", eta_s=31.2))
    status, body, headers = await house.post(CHAT, {"model": "dummy", "messages": []})
    assert status == 503
    message = check(body, type="service_unavailable_error", param="model", code="model_not_ready")
    assert "'dummy'" in message and "warmed up" in message and "loads weights" in message
    assert "/inside" not in json.dumps(body)
    assert headers["retry-after"] in ("31", "32")
    assert body["error"]["loading"]["state"] == "warming"
    assert 30 < body["error"]["loading"]["expected_s"] <= 31.2


@pytest.mark.parametrize(("eta", "age", "retry"), [(None, 0, "10"), (900.0, 0, "120"), (5.0, 60, "1")])
async def test_retry_after_stays_within_bounds(
    house: House, eta: float | None, age: float, retry: str
) -> None:
    house.serve(route("dummy", state="backoff", eta_s=eta, at=time.time() - age))
    _, _, headers = await house.post(CHAT, {"model": "dummy"})
    assert headers["retry-after"] == retry


async def test_a_runner_that_is_away_is_told_of_with_its_newest_state(
    house: House, runner: DummyRunner
) -> None:
    await runner.stop()

    async def news() -> None:
        await asyncio.sleep(0.05)
        house.serve(route("dummy", state="backoff", reason="exit status 137", eta_s=20.0))

    telling = asyncio.create_task(news())
    status, body, headers = await house.post(CHAT, {"model": "dummy"})
    await telling
    assert status == 503
    assert "exit status 137" in check(
        body, type="service_unavailable_error", param="model", code="model_not_ready"
    )
    assert int(headers["retry-after"]) in (19, 20)


async def test_an_unexpected_failure_shows_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("the inside")

    monkeypatch.setattr(house.gateway.directory, "find", broken)
    for status, body, headers in (
        await house.post(CHAT, {"model": "dummy"}),
        (lambda got: (got[0], json.loads(got[1]), got[2]))(await house.get("/v1/models/dummy")),
    ):
        assert status == 500
        assert "the inside" not in check(body, type="server_error", code="internal_error")
        assert headers["x-request-id"] in caplog.text
    assert "RuntimeError: the inside" in caplog.text


async def test_a_picture_for_a_text_model_is_refused(house: House, runner: DummyRunner) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    status, body, _ = await house.post(
        CHAT, {"model": "dummy", "messages": [{"role": "user", "content": [part]}]}
    )
    assert status == 400
    check(body, param="messages.[0].content.[0].image_url.url", code="unsupported_content")
    assert not runner.seen
    # The word alone, for instance in a tool's schema, is no picture.
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"image_url": {}}}}}]
    status, _, _ = await house.post(CHAT, {"model": "dummy", "messages": [], "tools": tools})
    assert status == 200


async def test_bad_pictures_are_refused_before_a_runner_sees_them(house: House, runner: DummyRunner) -> None:
    house.serve(route("eye", runner, category="vision"))
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    status, body, _ = await house.post(
        CHAT, {"model": "eye", "messages": [{"role": "user", "content": [part]}]}
    )
    assert status == 400
    assert body["error"]["code"] == "invalid_image"
    assert not runner.seen
