"""Fill in the middle: `suffix` of a completion, written as the prompt that a code model knows. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from engine.errors import bad_request
from engine.gateway.body import parse_object
from engine.routes import ModelRoute

_HOLES = re.compile(r"(\{prefix\}|\{suffix\})")


def fill_in_middle(body: bytes, route: ModelRoute) -> bytes:
    """The body to forward; the very same object when it has no suffix.

    Raises:
        ApiError: 400 when the model has no template, or prompt, suffix or stop are of a wrong type.
    """
    if b'"suffix"' not in body:
        return body
    request = parse_object(body)
    if "suffix" not in request:
        return body
    suffix = request.pop("suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise bad_request("'suffix' must be a string.", param="suffix", code="invalid_type")
    if not suffix:
        return msgspec.json.encode(request)
    if route.fim_template is None:
        raise bad_request(
            f"'{route.id}' cannot fill in the middle: it has no template for 'suffix'. Leave it out, or "
            "use a model with the capability 'fim' (GET /v1/models lists them).",
            param="suffix",
            code="unsupported_parameter",
        )
    prompt = request.get("prompt")
    if not isinstance(prompt, str):
        raise bad_request(
            "'prompt' must be one string when 'suffix' is given.", param="prompt", code="invalid_type"
        )
    request["prompt"] = write_prompt(route.fim_template, prompt, suffix)
    if route.fim_stop:
        request["stop"] = _with_stop(request.get("stop"), route.fim_stop)
    return msgspec.json.encode(request)


def write_prompt(template: str, prefix: str, suffix: str) -> str:
    """The template with its two holes filled; braces in the user's text mean nothing."""
    parts = {"{prefix}": prefix, "{suffix}": suffix}
    return "".join(parts.get(piece, piece) for piece in _HOLES.split(template))


def _with_stop(stop: Any, further: list[str]) -> list[str]:
    if stop is None:
        given: list[str] = []
    elif isinstance(stop, str):
        given = [stop]
    elif isinstance(stop, list) and all(isinstance(each, str) for each in stop):
        given = stop
    else:
        raise bad_request("'stop' must be a string or a list of strings.", param="stop", code="invalid_type")
    return [*given, *(each for each in further if each not in given)]
