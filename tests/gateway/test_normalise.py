"""Runners' errors, in whatever shape, become one."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from engine.gateway.events import EventBuffer
from engine.gateway.normalise import normalised, normalised_event
from tests.gateway.dummy import DummyRunner, House, chunk

CHAT = "/v1/chat/completions"


def rewritten(status: int, body: Any, **headers: str) -> tuple[str, str, str | None, str | None]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    error = normalised(status, data, lines, "m")
    assert error.status == status
    return error.message, error.type, error.param, error.code


def vllm(message: str, code: int, type: str = "BadRequestError", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens. However, your prompt contains 3000 tokens.",
        "Input length (9) exceeds model's maximum context length (8).",
        "The prompt is longer than the maximum model length of 512.",
    ],
)
def test_a_context_too_long_has_openais_code(message: str) -> None:
    said = rewritten(400, vllm(message, 400, param="input_tokens"))
    assert said == (message, "invalid_request_error", "input_tokens", "context_length_exceeded")


def test_vllms_numbers_and_types_become_openais() -> None:
    said = rewritten(400, vllm("temperature must be non-negative", 400, param="temperature"))
    assert said == ("temperature must be non-negative", "invalid_request_error", "temperature", None)
    assert rewritten(404, vllm("nothing here", 404, "NotFoundError"))[1] == "invalid_request_error"


def test_a_validation_report_becomes_a_sentence() -> None:
    report = (
        "2 validation errors:\n"
        "  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': {'model': 'm'}}\n"
        "  {'type': 'int', 'loc': ('body', 'n'), 'msg': 'Input should be a valid integer', 'input': 'x'}"
    )
    message, _, param, _ = rewritten(400, vllm(report, 400, "Bad Request", "body.messages"))
    assert message == "messages: Field required; n: Input should be a valid integer"
    assert param == "messages"
    assert rewritten(400, vllm(report, 400))[2] == "messages"


def test_a_long_validation_report_is_cut() -> None:
    lines = "".join(f"\n  {{'loc': 'body.messages.0.{i}', 'msg': 'no'}}" for i in range(9))
    message, _, param, _ = rewritten(400, vllm(f"9 validation errors:{lines}", 400))
    assert message == "messages.0.0: no; messages.0.1: no; messages.0.2: no; and 6 more"
    assert param == "messages.0.0"


def test_a_validation_report_that_cannot_be_read_is_kept() -> None:
    report = "1 validation error:\n  {'type': 'missing', 'loc' ...[truncated]"
    assert rewritten(400, vllm(report, 400))[0] == report


def test_fastapis_detail_is_read() -> None:
    assert rewritten(404, {"detail": "Not Found"})[0] == "Not Found"
    detail = [{"loc": ["body", "input", 0], "msg": "Field required", "type": "missing"}]
    assert rewritten(422, {"detail": detail}) == (
        "input.0: Field required",
        "invalid_request_error",
        "input.0",
        None,
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>oops</html>", b"\xff\xfe", b"[]", b"{}", b"null", b'{"detail": 7}', b'{"error": null}'],
)
def test_any_body_gives_a_message(body: bytes) -> None:
    message, type_, param, code = rewritten(400, body)
    assert message and (type_, param, code) == ("invalid_request_error", None, None)


def test_the_inside_of_a_runner_is_never_shown() -> None:
    trace = 'Traceback (most recent call last):\n  File "/x/site-packages/a.py", line 1\nKeyError: 1'
    for body in (
        vllm(trace, 500, "InternalServerError"),
        trace.encode(),
        {"detail": trace},
        vllm("secret", 500),
    ):
        message, type_, _, code = rewritten(500, body)
        assert "Traceback" not in message and "secret" not in message and "KeyError" not in message
        assert "'m'" in message
        assert (type_, code) == ("server_error", None)


def test_our_own_runners_errors_stay_as_they_are() -> None:
    own = {
        "error": {
            "message": "The queue is full.",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
    }
    error = normalised(429, json.dumps(own).encode(), [(b"retry-after", b"2"), (b"x-other", b"1")], "m")
    assert error.envelope() == own
    assert error.headers == {"retry-after": "2"}
    own = {"error": {"message": "Out of memory here.", "type": "server_error", "param": None, "code": "oom"}}
    assert normalised(500, json.dumps(own).encode(), [], "m").envelope() == own


def test_a_429_without_a_code_gets_one() -> None:
    assert rewritten(429, {"detail": "busy"})[3] == "rate_limit_exceeded"


def test_an_error_event_is_rewritten_and_others_are_not() -> None:
    event = b"data: " + json.dumps(vllm("maximum context length is 8", 400)).encode() + b"\n\n"
    error = json.loads(normalised_event(event, "m").removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "context_length_exceeded")
    for same in (
        chunk("x"),
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b'data: {"error": null}\n\n',
        b"data: {bad\n\n",
    ):
        assert normalised_event(same, "m") is same


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_only_whole_events_pass_and_no_byte_is_lost(size: int, end: bytes) -> None:
    whole = end.join([b"data: a", b": ping", b"event: x\ndata: b", b"data: [DONE]"]) + end + b"tail"
    events = EventBuffer("m")
    passed = [events.feed(whole[i : i + size]) for i in range(0, len(whole), size)]
    assert all(each == b"" or each.endswith(end) for each in passed)
    assert b"".join(passed) + events.rest() == whole
    assert events.rest() == b""


def test_an_error_event_among_others_is_rewritten() -> None:
    events = EventBuffer("m")
    error = b'data: {"error": {"message": "inside", "code": 500, "type": "InternalServerError"}}\n\n'
    got = events.feed(chunk("a") + error + b"data: [DONE]\n\n")
    assert got.startswith(chunk("a")) and got.endswith(b"data: [DONE]\n\n")
    assert b"inside" not in got and b'"server_error"' in got


async def test_the_client_sees_the_runners_refusal(house: House, runner: DummyRunner) -> None:
    runner.behaviour, runner.status = "fixed", 400
    runner.body = json.dumps(vllm("maximum context length is 8 tokens", 400)).encode()
    with pytest.raises(openai.BadRequestError) as caught:
        await house.openai.chat.completions.create(model="dummy", messages=[], stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.request_id


async def test_the_clients_retry_headers_pass(house: House, runner: DummyRunner) -> None:
    runner.behaviour, runner.status = "fixed", 429
    runner.body, runner.headers = b'{"detail": "busy"}', {"retry-after": "3"}
    status, body, headers = await house.post(CHAT, {"model": "dummy"})
    assert (status, headers["retry-after"]) == (429, "3")
    assert body["error"]["code"] == "rate_limit_exceeded"
