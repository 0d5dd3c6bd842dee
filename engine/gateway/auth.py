"""Bearer keys at the door: who calls, from where, and what the key allows."""

from __future__ import annotations

from datetime import UTC, datetime

from engine.errors import ApiError
from engine.metering.keyring import Caller, KeyRing
from engine.routes import ModelRoute

_CHALLENGE = {"www-authenticate": "Bearer"}


def authenticate(ring: KeyRing, authorization: bytes | None, address: str | None) -> Caller:
    """Whose key an `Authorization` header names; `address` is the caller's, None where it cannot
    be told.

    Raises:
        ApiError: 401 `invalid_api_key`, 403 `address_not_allowed`, 503 before the keys have been read; the
            message never repeats the key.
    """
    if authorization is None:
        raise _refused("No API key was given. Send it as the header 'Authorization: Bearer YOUR_KEY'.")
    text = authorization.decode("latin-1").strip()
    token = text[7:].strip()
    if not token or text[:7].lower() != "bearer ":
        raise _refused("The Authorization header must read 'Bearer YOUR_KEY'.")
    caller = ring.find(token)
    if caller is None:
        if not ring.loaded:
            raise ApiError(
                503,
                "The server cannot read its keys yet: its database is away. Try again in a moment.",
                code="keys_unavailable",
                headers={"retry-after": "2"},
            )
        raise _refused("The API key is not known to this server. Check it, or ask the operator for one.")
    now = ring.now_ms()
    if now >= caller.valid_until:
        raise _refused(_why(caller, caller.state(now)))
    if caller.networks and not caller.may_call_from(address):
        where = f"from {address}. Ask the operator to allow it"
        if address is None:
            where = "here: your address cannot be told (behind a proxy: its X-Forwarded-For is malformed)"
        raise ApiError(403, f"The API key may not be used {where}.", code="address_not_allowed")
    return caller


def check_allowed(caller: Caller, route: ModelRoute) -> None:
    """Holds a caller to the models and categories of its key.

    Raises:
        ApiError: 403 `model_not_allowed`.
    """
    if caller.may_use_all or caller.may_use(route.id, route.category):
        return
    allowed = caller.key.allowed
    what = [*allowed.models, *(f"{category} models" for category in allowed.categories)]
    raise ApiError(
        403,
        f"The API key may not use '{route.id}' ({route.category}): it is made for {', '.join(what)}.",
        param="model",
        code="model_not_allowed",
    )


def check_admin(caller: Caller) -> None:
    """Lets administrators' keys alone through.

    Raises:
        ApiError: 403 `admin_key_required`.
    """
    if not caller.key.admin:
        raise ApiError(
            403,
            "This needs an administrator's key: `hearth keys create --admin NAME` makes one.",
            code="admin_key_required",
        )


def _why(caller: Caller, state: str) -> str:
    if state == "expired" and caller.key.expires_at is not None:
        when = datetime.fromtimestamp(caller.key.expires_at / 1000, UTC)
        return f"The API key expired on {when:%Y-%m-%d %H:%M} UTC. Ask the operator for a new one."
    if state == "closed":
        return "The account of this API key is closed. Ask the operator."
    return "The API key was revoked. Ask the operator for a new one."


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=_CHALLENGE)
