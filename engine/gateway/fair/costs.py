"""What a request of one model costs: estimated before it is sent, learnt from what it turned out to be.

The unit is the model's own: tokens where there are tokens (a completion token counts as two prompt tokens, as
in the virtual token counters of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), else
megapixel steps of pictures to paint, else kilobytes of the body. Costs of different models are never
compared.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

#: What a completion token costs, in prompt tokens.
COMPLETION_WEIGHT = 2.0
#: Of models that nothing is known of yet.
_BYTES_PER_TOKEN, _COMPLETION_TOKENS = 4.0, 256.0
_SIDE_PIXELS, _STEPS = 512, 20
#: Weight of one more observation in a mean.
_NEW = 0.1
#: Time at a replica tells the cost but roughly, for it depends on the company: it changes an estimate by at
#: most this factor.
_MOST_BY_TIME = 8.0
#: No request is free: a thousand of the smallest are work, too.
_LEAST = 1.0
#: Larger numbers in a body are a mistake that the runner will answer; they must not bend any count.
_MOST_NUMBER = 1 << 20
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class Ask(NamedTuple):
    """The members of a request's body that tell its cost, as they came: of any type."""

    max_tokens: Any = None
    n: Any = None
    size: Any = None
    steps: Any = None
    #: Whether the client says that it can wait.
    batch: bool = False


class Cost(NamedTuple):
    """An estimate and what it was made of."""

    total: float
    #: Of the body: in prompt tokens, megapixel steps or kilobytes.
    body: float
    bytes: int
    #: Of all the answer's choices together.
    completion: float
    choices: int


class Costs:
    """The estimates of one model."""

    __slots__ = ("_completion", "_is_image", "_is_text", "_most", "_per_byte", "_per_second")

    def __init__(self, category: str, context_length: int | None) -> None:
        self._is_image = category == "image"
        self._is_text = category in ("chat", "code", "vision", "embedding")
        self._most = float(context_length) if context_length and self._is_text else float("inf")
        self._completion = _COMPLETION_TOKENS if category in ("chat", "code", "vision") else 0.0
        #: Prompt tokens per byte, by the body's length (its number of bits): a body of megabytes is a
        #: picture, and holds far fewer tokens a byte than a text.
        self._per_byte: dict[int, float] = {}
        #: Cost per second at a replica; 0 = nothing has been seen.
        self._per_second = 0.0

    def estimate(self, bytes: int, ask: Ask) -> Cost:
        """What a request will cost, as far as its body's length and a few members tell."""
        choices = 1 if ask.n is None else _count(ask.n, 1)
        if self._is_image:
            work = choices * _megapixels(ask.size) * _count(ask.steps, _STEPS)
            return Cost(max(_LEAST, work), work, bytes, 0.0, choices)
        if not self._is_text:
            work = bytes / 1024
            return Cost(max(_LEAST, work), work, bytes, 0.0, 1)
        body = min(self._most, bytes * self._rate(bytes))
        completion = self._completion
        if ask.max_tokens is not None:
            completion = min(completion, _count(ask.max_tokens, int(completion)))
        completion *= choices
        return Cost(max(_LEAST, body + COMPLETION_WEIGHT * completion), body, bytes, completion, choices)

    def learn(
        self, cost: Cost, *, prompt_tokens: int | None, completion_tokens: int | None, seconds: float
    ) -> float:
        """What the request has cost; from the tokens where they were told, else from its time at the replica.

        Args:
            cost: what was estimated.
            seconds: its time at the replica.
        """
        if prompt_tokens is None or not self._is_text:
            return self.by_time(cost, seconds, learn=True)
        bits, rate = cost.bytes.bit_length(), prompt_tokens / max(1, cost.bytes)
        known = self._per_byte.get(bits)
        self._per_byte[bits] = rate if known is None else _mean(known, rate)
        actual = float(prompt_tokens)
        if completion_tokens is not None:
            self._completion = _mean(self._completion, completion_tokens / cost.choices)
            actual += COMPLETION_WEIGHT * completion_tokens
        else:
            actual += COMPLETION_WEIGHT * cost.completion
        self._timed(actual, seconds)
        return max(_LEAST, actual)

    def by_time(self, cost: Cost, seconds: float, *, learn: bool = False) -> float:
        """What a request has cost of which only its time at the replica is known."""
        known = self._per_second
        if learn:
            self._timed(cost.total, seconds)
        if not known:
            return cost.total
        least = max(_LEAST, cost.total / _MOST_BY_TIME)
        return min(max(seconds * known, least), cost.total * _MOST_BY_TIME)

    def _timed(self, work: float, seconds: float) -> None:
        if seconds > 0:
            rate = work / seconds
            self._per_second = _mean(self._per_second, rate) if self._per_second else rate

    def _rate(self, bytes: int) -> float:
        """Prompt tokens per byte of a body of this length."""
        bits = bytes.bit_length()
        rates = self._per_byte
        found = rates.get(bits)
        if found is None:
            if not rates:
                return 1 / _BYTES_PER_TOKEN
            found = rates[min(rates, key=lambda each: abs(each - bits))]
        return found


def _mean(old: float, new: float) -> float:
    return old + _NEW * (new - old)


def _count(value: Any, default: int) -> int:
    """A whole number that is at least 1, or the default: what a runner will refuse costs nothing here."""
    if type(value) is int and 0 < value <= _MOST_NUMBER:
        return value
    return default


def _megapixels(size: Any) -> float:
    found = _SIZE.fullmatch(size) if isinstance(size, str) and len(size) < 16 else None
    pixels = int(found[1]) * int(found[2]) if found else _SIDE_PIXELS * _SIDE_PIXELS
    return min(pixels, 1 << 26) / 1e6
