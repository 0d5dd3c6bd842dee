"""Bearer keys at the door of `/v1`."""

from __future__ import annotations

from engine.errors import ApiError
from engine.metering.keys import Key, KeyRing

_CHALLENGE = {"www-authenticate": "Bearer"}


def authenticate(ring: KeyRing, authorization: bytes | None) -> Key:
    """The key that an `Authorization` header names.

    Raises:
        ApiError: 401 `invalid_api_key`; the message never repeats the key.
    """
    if authorization is None:
        raise _refused("No API key was given. Send it as the header 'Authorization: Bearer YOUR_KEY'.")
    scheme, _, token = authorization.decode("latin-1").strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise _refused("The Authorization header must read 'Bearer YOUR_KEY'.")
    key = ring.find(token)
    if key is None:
        raise _refused("The API key is not known to this server. Check it, or ask the operator for one.")
    return key


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=_CHALLENGE)
