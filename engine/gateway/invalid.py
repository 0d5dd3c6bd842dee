"""What is told of a request to a page that FastAPI's validation refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import ApiError, bad_request
from engine.metering.lookup import shown


def invalid_request(errors: Sequence[Any]) -> ApiError:
    """The 400 for the first of pydantic's errors, in words that name the field."""
    first = errors[0]
    kind, place = first["type"], [str(part) for part in first["loc"]]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return bad_request(f"The body is no JSON: {reason} (at character {place[-1]}).", code="invalid_json")
    where = shown(".".join(part for part in place[1:] if part != "[key]"))
    if not where:
        what = "missing" if kind == "missing" or first.get("input") is None else "no JSON object"
        return bad_request(f"The body is {what}: send the fields as one JSON object.")
    if kind == "value_error":
        return bad_request(f"{where}: {first['ctx']['error']}.", param=where)
    if kind == "extra_forbidden":
        return bad_request(f"{where} is no field here: GET /docs lists those there are.", param=where)
    if kind == "missing":
        return bad_request(f"{where} is missing.", param=where)
    return bad_request(f"{where}: {first['msg']}.", param=where)
