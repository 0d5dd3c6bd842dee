"""How long answers' first bytes have been waited for lately."""

from __future__ import annotations

import time
from collections.abc import Callable

#: A mean is over the slot of time that runs and the one before: 5 to 10 s.
_SLOT_S = 5.0


class FirstBytes:
    """Per model, the mean wait for the first event of a stream over the last 5 to 10 seconds.

    Streams alone are counted: a whole answer's first byte tells how long the work took, not how long it
    waited.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: By model: the slot's number, then sum and count of that slot and of the one before.
        self._seen: dict[str, tuple[int, float, int, float, int]] = {}

    def add(self, model: str, seconds: float) -> None:
        slot, total, count, before, before_count = self._turned(model)
        self._seen[model] = (slot, total + seconds, count + 1, before, before_count)

    def mean(self, model: str) -> float | None:
        """Seconds; None when no stream has begun lately."""
        _, total, count, before, before_count = self._turned(model)
        if not count + before_count:
            return None
        return (total + before) / (count + before_count)

    def _turned(self, model: str) -> tuple[int, float, int, float, int]:
        """What is known of the model, as of the present slot."""
        slot = int(self._clock() / _SLOT_S)
        seen = self._seen.get(model)
        if seen is None or seen[0] < slot - 1:
            return (slot, 0.0, 0, 0.0, 0)
        if seen[0] == slot:
            return seen
        return (slot, 0.0, 0, seen[1], seen[2])
