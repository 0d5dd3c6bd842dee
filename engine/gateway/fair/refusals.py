"""What a request is told that has no place in the line. Pure functions."""

from __future__ import annotations

import math

from engine.errors import ApiError
from engine.gateway.loading import LEAST_RETRY_S, MOST_RETRY_S


def full(model: str, waiting: int, outlook_s: float) -> ApiError:
    """429: too many wait already, and this request's key has most of what waits.

    Args:
        outlook_s: how long until what waits of this key has been let in, seconds.
    """
    after_s = _bounded(outlook_s)
    return ApiError(
        429,
        f"'{model}' is busy: {waiting} requests wait for it, as many as may, and nobody has more waiting "
        f"than this key. Try again in {math.ceil(after_s)} s.",
        code="queue_full",
        headers=_headers(after_s),
    )


def too_long(model: str, waited_s: float, outlook_s: float) -> ApiError:
    """503: it has waited for its turn as long as it may."""
    after_s = _bounded(outlook_s)
    return ApiError(
        503,
        f"'{model}' is busy: this request has waited {waited_s:.0f} s for its turn, as long as it may. "
        f"Try again in {math.ceil(after_s)} s.",
        code="queue_timeout",
        headers=_headers(after_s),
    )


def _bounded(outlook_s: float) -> float:
    return min(float(MOST_RETRY_S), max(float(LEAST_RETRY_S), outlook_s))


def _headers(after_s: float) -> dict[str, str]:
    return {"retry-after": str(math.ceil(after_s)), "retry-after-ms": str(math.ceil(after_s * 1000))}
