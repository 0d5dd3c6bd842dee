"""Errors of runners, rewritten into OpenAI's envelope. Pure functions.

vLLM's own server puts a number in `code` and names of its own in `type`; FastAPI says `{"detail": …}`; our
runners say what a client should read. Whatever comes, a client sees one shape, and never the inside of a
process.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from typing import Any

from engine.errors import ApiError, type_of_status

log = logging.getLogger("hearth.gateway")

#: The types that our own errors have: an error with another was written by a library.
_OWN_TYPES = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "service_unavailable_error",
    "server_error",
}
_CONTEXT = re.compile(
    r"maximum (?:context|model) length|max_model_len|context length|longer than the maximum", re.IGNORECASE
)
_INSIDE = re.compile(
    r"Traceback \(most recent|File \"[^\"]+\", line|/site-packages/|stack trace", re.IGNORECASE
)
_VALIDATION = re.compile(r"^\d+ validation errors?:?\s*\n", re.IGNORECASE)
_RETRY_HEADERS = (b"retry-after", b"retry-after-ms", b"x-should-retry", b"allow")
_MOST_MESSAGE = 2000
#: A field that may be one of many shapes has a fault for each of them.
_MOST_FAULTS = 3


def normalised(status: int, body: bytes, headers: list[tuple[bytes, bytes]], model: str) -> ApiError:
    """The error that a client sees for a runner's answer of 400 or more.

    Args:
        status: the runner's status; kept.
        body: its body, of any shape.
        headers: its headers; those about retrying are kept.
        model: the model's name, for the message of a failure without one.
    """
    message, type_, param, code = _read(body)
    kept = {
        name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name in _RETRY_HEADERS
    }
    own = type_ in _OWN_TYPES and not isinstance(code, int)
    if status >= 500 and (not own or _INSIDE.search(message)):
        log.error("the runner of %s answered %d: %s", model, status, _shortened(message or repr(body[:500])))
        if status not in (501, 503) or not message or _INSIDE.search(message):
            message = f"The runner of '{model}' failed on this request. The operator's log says why."
    message = _shortened(message) or f"The runner of '{model}' refused the request with status {status}."
    return ApiError(
        status,
        message,
        type=type_ if own else type_of_status(status),
        param=param,
        code=_code(status, message, code),
        headers=kept,
    )


def normalised_event(event: bytes, model: str) -> bytes:
    """A server-sent event; rewritten when it is an error, else the very bytes."""
    if not event.lstrip().startswith(b"data: {"):
        return event
    data = event.strip().removeprefix(b"data: ")
    try:
        parsed = json.loads(data)
    except ValueError:
        return event
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if not error:
        return event
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    if isinstance(error, dict) and error.get("type") in _OWN_TYPES and not isinstance(code, int):
        return event
    return normalised(status, data, [], model).event()


def _read(body: bytes) -> tuple[str, str | None, str | None, Any]:
    """Message, type, param and code of a body; what is not there is empty or None."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        # Plain text from a server's own machinery; HTML says nothing that a client could use.
        text = body.decode("utf-8", "replace").strip()
        return ("" if text.startswith("<") else text), None, None, None
    if not isinstance(parsed, dict):
        return "", None, None, None
    error = parsed.get("error", parsed if "message" in parsed else None)
    if isinstance(error, str):
        return error, None, None, None
    if isinstance(error, dict):
        message, param = str(error.get("message") or ""), error.get("param")
        type_ = error.get("type")
        tidy, where = _validation(message)
        param = param if isinstance(param, str) else where
        return tidy, type_ if isinstance(type_, str) else None, _param(param), error.get("code")
    return *_detail(parsed.get("detail")), None


def _detail(detail: Any) -> tuple[str, None, str | None]:
    """FastAPI's `detail`: a text, or a list of what is wrong where."""
    if isinstance(detail, str):
        return detail, None, None
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        where = _param(".".join(str(part) for part in detail[0].get("loc", ())))
        said = str(detail[0].get("msg", "is not valid"))
        return (f"{where}: {said}" if where else said), None, where
    return "", None, None


def _validation(message: str) -> tuple[str, str | None]:
    """Makes pydantic's report, printed as Python by vLLM, a sentence: `messages: Field required`."""
    if not _VALIDATION.match(message):
        return message, None
    said: list[str] = []
    first: str | None = None
    for line in message.splitlines()[1:]:
        try:
            item = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if not isinstance(item, dict) or "msg" not in item:
            continue
        loc = item.get("loc", "")
        where = _param(loc if isinstance(loc, str) else ".".join(str(part) for part in loc))
        first = first or where
        text = f"{where}: {item['msg']}" if where else str(item["msg"])
        if text not in said:
            said.append(text)
    if len(said) > _MOST_FAULTS:
        said = [*said[:_MOST_FAULTS], f"and {len(said) - _MOST_FAULTS} more"]
    return ("; ".join(said) or message), first


def _param(where: Any) -> str | None:
    """A field's place without the word for the body before it."""
    if not isinstance(where, str):
        return None
    return where.removeprefix("body").lstrip(".") or None


def _code(status: int, message: str, code: Any) -> str | None:
    if isinstance(code, str) and code:
        return code
    if status in (400, 413, 422) and _CONTEXT.search(message):
        return "context_length_exceeded"
    if status == 429:
        return "rate_limit_exceeded"
    return None


def _shortened(message: str) -> str:
    return message if len(message) <= _MOST_MESSAGE else message[:_MOST_MESSAGE] + "…"
