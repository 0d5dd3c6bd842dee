"""vLLM's error bodies, turned into OpenAI's."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from engine.runners.vllm_errors import OpenAIErrors, translate


def error_of(status: int, body: object) -> tuple[int, dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    error = translate(status, raw)
    return error.status, error.envelope()["error"]


def test_a_number_as_code_becomes_null_and_the_type_openais() -> None:
    body = {
        "error": {
            "message": "temperature must be in [0, 2]",
            "type": "BadRequestError",
            "param": "temperature",
        }
    }
    body["error"]["code"] = 400  # type: ignore[assignment]  # what vLLM sends
    assert error_of(400, body) == (
        400,
        {
            "message": "temperature must be in [0, 2]",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": None,
        },
    )


def test_a_too_long_prompt_has_openais_code_and_a_field_of_the_request() -> None:
    message = "This model's maximum context length is 8192 tokens. However, your prompt contains 9000"
    body = {"error": {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}}
    status, error = error_of(400, body)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert translate(400, json.dumps(body).encode(), "/v1/completions").param == "prompt"


def test_an_unknown_model_is_model_not_found() -> None:
    body = {
        "error": {
            "message": "The model `x` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    }
    assert error_of(404, body)[1]["code"] == "model_not_found"


def test_a_validation_error_names_the_field_without_the_body() -> None:
    message = (
        "1 validation error:\n  {'type': 'int_parsing', 'loc': 'body.max_tokens', "
        "'msg': 'Input should be a valid integer, unable to parse string as an integer', 'input': 'x'}"
    )
    body = {"error": {"message": message, "type": "Bad Request", "param": "body.max_tokens", "code": 400}}
    _, error = error_of(400, body)
    assert error["param"] == "max_tokens"
    assert (
        error["message"]
        == "max_tokens: Input should be a valid integer, unable to parse string as an integer"
    )


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            422,
            {"detail": [{"loc": ["body", "messages"], "msg": "Field required"}]},
            "messages: Field required",
        ),
        (404, {"detail": "Not Found"}, "Not Found"),
        (500, b"Internal Server Error", "Internal Server Error"),
        (500, b"", "The model's server answered 500 without a reason."),
        (400, {"object": "error", "message": "flat", "code": 400}, "flat"),
    ],
)
def test_every_shape_gives_a_message(status: int, body: object, message: str) -> None:
    got, error = error_of(status, body)
    assert error["message"] == message and got == (400 if status == 422 else status)


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "Failed to load image: cannot identify image file <_io.BytesIO object>", "invalid_image"),
        (400, "Non-base64 digit found", "invalid_image"),
        (
            500,
            "Image size (9 pixels) exceeds limit of 8 pixels, could be decompression bomb DOS attack.",
            "image_too_large",
        ),
        (
            400,
            "Image dimensions 9x9 (81 pixels) exceed the maximum of 80 pixels. Set VLLM_",
            "image_too_large",
        ),
        (400, "The URL must be from one of the allowed domains: ['none.invalid'].", "invalid_image_url"),
        (500, "Cannot load local files without `--allowed-local-media-path`.", "invalid_image_url"),
        (501, "Only base64 data URLs are supported for now.", "invalid_image_url"),
    ],
)
def test_a_bad_picture_is_the_clients_mistake(status: int, message: str, code: str) -> None:
    got, error = error_of(status, {"error": {"message": message, "type": "x", "param": None, "code": status}})
    assert (got, error["code"], error["param"]) == (400, code, "messages")
    assert "VLLM" not in error["message"] and "none.invalid" not in error["message"]


Message = MutableMapping[str, Any]


async def through(*messages: Message) -> list[Message]:
    """What a client gets when vLLM sends ``messages``."""
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await OpenAIErrors(app)({"type": "http", "path": "/v1/completions"}, receive, send)
    return sent


async def test_an_answer_in_order_passes_untouched() -> None:
    messages: list[Message] = [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": b'data: {"a": 1}\n\n', "more_body": True},
        {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False},
    ]
    got = await through(*messages)
    assert all(a is b for a, b in zip(got, messages, strict=True))


async def test_an_error_in_pieces_is_rewritten_with_its_length() -> None:
    raw = b'{"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 400}}'
    got = await through(
        {
            "type": "http.response.start",
            "status": 400,
            "headers": [(b"content-length", b"1"), (b"x-request-id", b"r")],
        },
        {"type": "http.response.body", "body": raw[:20], "more_body": True},
        {"type": "http.response.body", "body": raw[20:], "more_body": False},
    )
    headers = dict(got[0]["headers"])
    assert got[0]["status"] == 400 and headers[b"x-request-id"] == b"r"
    assert headers[b"content-length"] == str(len(got[1]["body"])).encode()
    assert json.loads(got[1]["body"])["error"]["code"] is None and len(got) == 2


async def test_what_is_raised_after_the_answer_does_not_cut_the_connection() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise RuntimeError("logged, not passed on")

    async def dies(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("passed on")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    await OpenAIErrors(app)(scope, receive, send)
    assert json.loads(sent[1]["body"])["error"]["type"] == "server_error"
    with pytest.raises(RuntimeError, match="passed on"):
        await OpenAIErrors(dies)(scope, receive, send)


async def test_an_error_in_mid_stream_has_the_same_shape() -> None:
    event = (
        b'data: {"error": {"message": "gone", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
    )
    got = await through(
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": event, "more_body": True},
        {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False},
    )
    error = json.loads(got[1]["body"].removeprefix(b"data: "))["error"]
    assert error == {"message": "gone", "type": "server_error", "param": None, "code": None}
    assert got[1]["body"].endswith(b"\n\n") and got[2]["body"] == b"data: [DONE]\n\n"
