"""Request bodies: read with a bound, and looked at no further than routing needs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec

from engine.errors import ApiError, bad_request
from engine.gateway.exchange import ClientGoneError, Exchange, Receive
from engine.gateway.fair.costs import Ask


class Head(NamedTuple):
    """What routing needs of a body."""

    model: str
    stream: bool
    ask: Ask = Ask()


class _Wanted(msgspec.Struct):
    """The decoder skips every other member without building it."""

    model: Any = msgspec.UNSET
    stream: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    n: Any = None
    size: Any = None
    steps: Any = None
    num_inference_steps: Any = None
    service_tier: Any = None


_DECODER = msgspec.json.Decoder(_Wanted)


async def read_body(receive: Receive, exchange: Exchange, limit: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 over `limit` bytes (announced or read), 415 for a compressed body.
        ClientGoneError: the client left while sending.
    """
    encoding = exchange.headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"", b"identity"):
        raise ApiError(
            415,
            "Compressed request bodies are not taken. Send the body without Content-Encoding.",
            code="unsupported_content_encoding",
        )
    announced = exchange.headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        if part:
            parts.append(part)
        if not message.get("more_body", False):
            break
    exchange.bytes_in = size
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than this server takes ({limit} bytes; the operator sets "
        "gateway.max_body_bytes).",
        code="request_too_large",
    )


def check_json_type(content_type: bytes | None) -> None:
    """Refuses a content type that says the body is something else than JSON; none at all is taken as JSON.

    Raises:
        ApiError: 415.
    """
    if content_type is None:
        return
    kind = content_type.split(b";", 1)[0].strip().lower()
    if kind in (b"", b"application/json") or kind.endswith(b"+json"):
        return
    raise ApiError(
        415,
        f"This endpoint takes JSON; the request says it is '{kind.decode('latin-1')}'. "
        "Send the header 'Content-Type: application/json'.",
        code="unsupported_media_type",
    )


def json_head(body: bytes) -> Head:
    """`model`, `stream` and what tells the cost of a JSON body; everything else is skipped, not built.

    Raises:
        ApiError: 400 for an empty body, one that is not UTF-8, not JSON, not an object, or whose model or
            stream is missing or of a wrong type.
    """
    if not body:
        raise bad_request("The request has no body. Send a JSON object.", code="invalid_json")
    if not body.isascii():
        try:
            # The decoder does not check the text it skips.
            body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise bad_request(
                f"The request body is not UTF-8: byte {error.start} (0x{body[error.start]:02x}) is wrong.",
                code="invalid_encoding",
            ) from None
    try:
        wanted = _DECODER.decode(body)
    except msgspec.ValidationError:
        raise bad_request("The request body must be a JSON object.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise malformed(body, str(error)) from None
    except RecursionError:
        raise _too_deep() from None
    return Head(_model(wanted.model), _stream(wanted.stream), _ask(wanted))


def _ask(wanted: _Wanted) -> Ask:
    most = wanted.max_completion_tokens
    steps = wanted.num_inference_steps
    return Ask(
        wanted.max_tokens if most is None else most,
        wanted.n,
        wanted.size,
        wanted.steps if steps is None else steps,
        wanted.service_tier == "flex",
    )


def malformed(body: bytes, reason: str) -> ApiError:
    """The 400 for a body that is not JSON, with the place of the first fault."""
    try:
        json.loads(body)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except (ValueError, RecursionError):
        # UTF-16 with a mark, nesting too deep: the first parser's words must do.
        pass
    return bad_request(f"The request body is not valid JSON: {reason}.", code="invalid_json")


def _too_deep() -> ApiError:
    return bad_request("The request body is nested too deeply.", code="invalid_json")


def parse_object(body: bytes) -> dict[str, Any]:
    """The whole body as a mapping, for the few requests whose body must be changed.

    Raises:
        ApiError: 400 when it is not a JSON object.
    """
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise malformed(body, str(error)) from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(parsed, dict):
        raise bad_request("The request body must be a JSON object.", code="invalid_json")
    return parsed


def missing_model() -> ApiError:
    return bad_request(
        "The request names no model. Give the field 'model'; GET /v1/models lists the names.",
        param="model",
        code="missing_required_parameter",
    )


def _model(value: Any) -> str:
    if value is msgspec.UNSET or value is None or value == "":
        raise missing_model()
    if not isinstance(value, str):
        raise bad_request(
            f"'model' must be a string, not {_json_type(value)}.", param="model", code="invalid_type"
        )
    return value


def _stream(value: Any) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise bad_request(
            f"'stream' must be true or false, not {_json_type(value)}.", param="stream", code="invalid_type"
        )
    return value


def _json_type(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), "a string")
