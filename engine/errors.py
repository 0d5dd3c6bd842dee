"""The one error of Hearth's HTTP surfaces: OpenAI's envelope with a status.

Gateway and runners raise :class:`ApiError`; each turns it into
``{"error": {"message", "type", "param", "code"}}`` at its edge.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any


class ApiError(Exception):
    """A failure that a client may see.

    Args:
        status: HTTP status (400 to 599).
        message: for a person: the thing, the reason, the next step.
        type: OpenAI's ``type``; derived from the status when not given.
        param: the request field at fault, dotted for nested ones, or None.
        code: a stable short name for programs, a string or None (never a number).
        headers: extra answer headers, for instance ``retry-after`` (seconds).
        extra: further members of the ``error`` object, for instance ``loading``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or type_of_status(status)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def envelope(self) -> dict[str, Any]:
        """The answer's body as a JSON-able mapping."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**error, **self.extra}}

    def body(self) -> bytes:
        """The envelope as UTF-8 JSON."""
        return json.dumps(self.envelope(), ensure_ascii=False).encode()

    def event(self) -> bytes:
        """The envelope as one server-sent event, for a failure in mid-stream."""
        return b"data: " + self.body() + b"\n\n"


def type_of_status(status: int) -> str:
    """OpenAI's error ``type`` for an HTTP status."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    if status == 503:
        return "service_unavailable_error"
    if status >= 500:
        return "server_error"
    return "invalid_request_error"


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request is at fault and a retry will not help."""
    return ApiError(400, message, param=param, code=code)


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """The known names closest to ``name``, best first (difflib's ratio, at least 0.5)."""
    lowered = {k.lower(): k for k in known}
    return [lowered[m] for m in difflib.get_close_matches(name.lower(), lowered, n=most, cutoff=0.5)]
