"""The Idempotency-Key as clients send it, what makes two requests the same, and the refusals."""

from __future__ import annotations

import asyncio
import hashlib
import re

from engine.errors import ApiError
from engine.metering.idempotency import InProgress, Mismatch

_SANE_KEY = re.compile(rb"[\x20-\x7e]{1,255}")
_BOUNDARY = re.compile(rb'boundary="?([^";]{1,200})"?', re.IGNORECASE)
#: A longer body is digested in a thread.
_THREAD_BYTES = 256 * 1024


def check_idempotency_key(value: bytes) -> str:
    """The header's value as it is kept.

    Raises:
        ApiError: 400: it is empty, too long, or has characters other than printable ASCII.
    """
    if not _SANE_KEY.fullmatch(value):
        raise ApiError(
            400,
            "The Idempotency-Key must be 1 to 255 printable ASCII characters; send for instance a UUID, the "
            "same for each retry of one request.",
            code="invalid_idempotency_key",
        )
    return value.decode("ascii")


async def hash_request(path: str, content_type: bytes, body: bytes) -> str:
    """What a request and its retry have in common: the digest of path and body, hexadecimal.

    A client makes up a new boundary for each try of a form, so that is left out.
    """
    if len(body) <= _THREAD_BYTES:
        return _hash(path, content_type, body)
    return await asyncio.to_thread(_hash, path, content_type, body)


def _hash(path: str, content_type: bytes, body: bytes) -> str:
    digest = hashlib.sha256(path.encode() + b"\0")
    boundary = _BOUNDARY.search(content_type) if content_type.lower().startswith(b"multipart/") else None
    digest.update(body if boundary is None else body.replace(b"--" + boundary[1], b"--"))
    return digest.hexdigest()


def refusal(outcome: InProgress | Mismatch) -> ApiError:
    """The answer to a request whose key cannot be used now."""
    if isinstance(outcome, InProgress):
        return ApiError(
            409,
            f"A request with this Idempotency-Key is being answered since {outcome.since_s:.1f} s. Try again "
            "when it has ended; the retry then gets its answer.",
            code="idempotency_key_in_use",
            headers={"retry-after": "1", "retry-after-ms": "1000"},
        )
    return ApiError(
        422,
        "This Idempotency-Key was used for a request with another path or body within the last day. Send the "
        "same request again, or use a new key.",
        code="idempotency_key_reused",
    )
