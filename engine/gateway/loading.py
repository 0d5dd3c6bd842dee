"""What a client is told of a model that takes no requests at this moment. Pure functions."""

from __future__ import annotations

import math
import time

from engine.errors import ApiError
from engine.routes import ModelRoute

#: Bounds of `retry-after`, seconds; clients of OpenAI's SDK do not wait longer than two minutes.
LEAST_RETRY_S, MOST_RETRY_S = 1, 120
#: Said when nobody knows how long a model still takes.
UNKNOWN_RETRY_S = 10
_MOST_REASON = 300

_WORDS = {
    "planned": "waiting for its turn to start",
    "preparing": "having its weights fetched or converted",
    "starting": "loading",
    "warming": "loaded and being warmed up",
    "ready": "without a runner at this moment",
    "asleep": "asleep",
    "waking": "waking up",
    "draining": "finishing its last requests before it stops",
    "stopped": "stopped",
    "failed": "failed",
    "backoff": "failed and waiting to be started again",
}


def remaining_s(route: ModelRoute, now: float) -> float | None:
    """Roughly how long until the model is ready, seconds from `now` (Unix time); None when nobody knows."""
    if route.eta_s is None:
        return None
    return max(0.0, route.eta_s - max(0.0, now - route.at))


def first_line(reason: str) -> str:
    """A reason without what follows its first line: the rest belongs in the operator's log."""
    line = reason.strip().partition("\n")[0].strip().rstrip(".")
    return line if len(line) <= _MOST_REASON else line[:_MOST_REASON] + "…"


def not_ready(
    route: ModelRoute,
    now: float | None = None,
    *,
    elapsed_s: float | None = None,
    reason: str | None = None,
    note: str = "",
) -> ApiError:
    """The 503 for a model without a ready replica: which, in what state, why, and how long it still takes.

    Args:
        route: its row of the newest table.
        now: Unix time; None = the clock's.
        elapsed_s: how long it has been on its way, as this gateway worker knows (see
            `Directory.elapsed_s`); None = not known, or it is not on its way.
        reason: instead of the row's.
        note: a sentence about this request, put before the outlook.
    """
    now = time.time() if now is None else now
    left = remaining_s(route, now)
    retry_s = float(UNKNOWN_RETRY_S) if left is None else min(MOST_RETRY_S, max(LEAST_RETRY_S, left))
    reason = first_line(route.reason if reason is None else reason)
    because = f" ({reason})" if reason else ""
    if left is None:
        outlook = "How long it takes is not known yet"
    elif left < LEAST_RETRY_S:
        outlook = "It should be ready any moment"
    else:
        outlook = f"It should be ready in about {_duration(left)}"
    state = _WORDS[route.state]
    if route.state == "draining" and route.tier == "standby":
        state = "making room for another model"
    what = "it" if route.owner is None else f"the replica dedicated to '{route.owner}'"
    words = [f"Model '{route.id}' is not ready: {what} is {state}{because}."]
    if note:
        words.append(note)
    words.append(f"{outlook}; try again in {math.ceil(retry_s)} s.")
    return ApiError(
        503,
        " ".join(words),
        param="model",
        code="model_not_ready",
        headers={"retry-after": str(math.ceil(retry_s)), "retry-after-ms": str(math.ceil(retry_s * 1000))},
        extra={
            "loading": {
                "state": route.state,
                "reason": reason,
                "elapsed_s": None if elapsed_s is None else round(elapsed_s, 1),
                "expected_s": left,
            }
        },
    )


def _duration(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 100 else f"{math.ceil(whole / 60)} min"
