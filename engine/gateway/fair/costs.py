"""What a request of one model costs: estimated before it is sent, learnt from what it turned out to be.

The unit is the second of one replica, all of it. A request stays at a replica for

    reading * (its prompt tokens + those of others meanwhile) + writing * its completion tokens   (texts)
    writing * megapixel steps, or kilobytes of the body                                 (everything else)

seconds. Reading a prompt takes the engine's whole step while it lasts, from all that are there; writing takes
one place of the batch, so it costs its time divided by `max_batch`. Both factors are learnt from requests
with known counts by multiplicative updates: each takes the part of the error that its term has in the
estimate (exponentiated gradient, Kivinen and Warmuth, 1997), so that both stay positive and requests which
are all alike leave their ratio as it was. That reading and writing must be weighed against each other, and
an estimate be corrected once an answer's length is known: virtual token counters, Sheng et al., "Fairness
in Serving Large Language Models", OSDI 2024.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

#: Of models that nothing is known of yet.
_BYTES_PER_TOKEN, _COMPLETION_TOKENS = 4.0, 256.0
_READING_S, _WRITING_S = 1e-4, 2e-2
_SIDE_PIXELS, _STEPS = 512, 20
#: Weight of one more observation in a mean; more for the first ones.
_NEW = 0.1
#: Time at a replica tells the cost but roughly, for it depends on the company: it changes an estimate by at
#: most this factor.
_MOST_BY_TIME = 8.0
#: A time is taken to be off by no more than this, whatever a clock says.
_LEAST_ERROR, _MOST_ERROR = 1e-6, 1e6
#: No request is free, seconds.
_LEAST_S = 1e-4
#: Larger numbers in a body are a mistake that the runner will answer; they must not bend any count.
_MOST_NUMBER = 1 << 20
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_WRITES = frozenset({"chat", "code", "vision"})


class Ask(NamedTuple):
    """The members of a request's body that tell its cost, as they came: of any type."""

    max_tokens: Any = None
    n: Any = None
    size: Any = None
    steps: Any = None
    #: Whether the client says that it can wait.
    batch: bool = False


class Cost(msgspec.Struct, frozen=True, gc=False):
    """An estimate and what it was made of."""

    #: Seconds of one replica.
    total: float
    bytes: int
    #: Prompt tokens, where the model writes.
    read: float
    #: Completion tokens of each choice; else megapixel steps or kilobytes.
    write: float
    choices: int


class _Rates(dict[int, float]):
    """Prompt tokens per byte, by the body's length (its number of bits): a body of megabytes is a picture,
    and holds far fewer tokens a byte than a text."""

    def __missing__(self, bits: int) -> float:
        """Of lengths that have not been seen the nearest tells."""
        if not self:
            return 1 / _BYTES_PER_TOKEN
        return self[min(self, key=lambda each: abs(each - bits))]


class Costs:
    """The estimates of one model."""

    __slots__ = (
        "_category",
        "_completion",
        "_few",
        "_most",
        "_per_byte",
        "_places",
        "_read",
        "_reading",
        "_seen",
        "_writes",
        "_writing",
        "_wrote",
    )

    def __init__(self, category: str, context_length: int | None, max_batch: int = 1) -> None:
        self._category = category
        self._writes = category in _WRITES
        self._most = float(context_length or _MOST_NUMBER)
        self._completion = _COMPLETION_TOKENS
        self._per_byte = _Rates()
        self._reading, self._writing = _READING_S, _WRITING_S
        self._places = max_batch
        self._seen = 0
        #: How many observations have told of each factor.
        self._read = self._wrote = 0.0
        #: Whether some weight is still more than `_NEW`, or the model does not write.
        self._few = True

    def estimate(self, bytes: int, ask: Ask) -> Cost:
        """What a request will cost, as far as its body's length and a few members tell."""
        choices = 1
        if ask.n is not None:
            choices = _count(ask.n, 1)
        if not self._writes:
            return self._estimate_other(bytes, ask, choices)
        read = bytes * self._per_byte[bytes.bit_length()]
        if read > self._most:
            read = self._most
        write = self._completion
        if ask.max_tokens is not None:
            write = min(write, _count(ask.max_tokens, _MOST_NUMBER))
        # As `_total`, without a call.
        total = self._reading * read + self._writing * write * choices / self._places
        if total < _LEAST_S:
            total = _LEAST_S
        return Cost(total, bytes, read, write, choices)

    def _estimate_other(self, bytes: int, ask: Ask, choices: int) -> Cost:
        if self._category == "image":
            write = _megapixels(ask.size) * _count(ask.steps, _STEPS)
        else:
            write, choices = bytes / 1024, 1
        return Cost(self._total(0.0, write, choices), bytes, 0.0, write, choices)

    def learn(
        self,
        cost: Cost,
        *,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        seconds: float,
        others_read: float = 0.0,
    ) -> float:
        """What the request has cost; from the tokens where they were told, else from its time.

        Args:
            cost: what was estimated.
            seconds: its time at the replica.
            others_read: prompt tokens of others that this replica was given meanwhile.
        """
        if self._few or prompt_tokens is None or completion_tokens is None:
            return self._learn(cost, prompt_tokens, completion_tokens, seconds, others_read)
        # What `_learn` does of a text whose tokens were told, once every weight is `_NEW`.
        choices = cost.choices
        write = completion_tokens / choices
        reading, writing = self._reading, self._writing
        term = reading * (prompt_tokens + others_read)
        expected = term + writing * write
        error = seconds / expected if expected else 0.0
        if error < _LEAST_ERROR or error > _MOST_ERROR:
            return self._learn(cost, prompt_tokens, completion_tokens, seconds, others_read)
        change = error**_NEW
        of_reading = change ** (term / expected)
        self._reading = reading = reading * of_reading
        self._writing = writing = writing * change / of_reading
        self._completion += _NEW * (write - self._completion)
        bytes = cost.bytes
        bits = bytes.bit_length()
        rates = self._per_byte
        rate = prompt_tokens / (bytes or 1)
        known = rates.get(bits, rate)
        rates[bits] = known + _NEW * (rate - known)
        total = reading * prompt_tokens + writing * completion_tokens / self._places
        return total if total > _LEAST_S else _LEAST_S

    def _learn(
        self, cost: Cost, prompt: int | None, completion: int | None, seconds: float, others_read: float
    ) -> float:
        self._seen += 1
        if not self._writes:
            actual = self.by_time(cost, seconds)
            self._timed(0.0, cost.write, seconds)
            return actual
        if prompt is None:
            return self.by_time(cost, seconds)
        bits, rate = cost.bytes.bit_length(), prompt / max(1, cost.bytes)
        known = self._per_byte.get(bits, rate)
        new = max(_NEW, 1 / self._seen)
        self._per_byte[bits] = known + new * (rate - known)
        write = cost.write
        if completion is not None:
            write = completion / cost.choices
            self._completion += new * (write - self._completion)
        self._timed(prompt + others_read, write, seconds)
        return self._total(prompt, write, cost.choices)

    def by_time(self, cost: Cost, seconds: float) -> float:
        """What a request has cost of which only its time at the replica is known."""
        expected = self._reading * cost.read + self._writing * cost.write
        if not self._seen or not expected:
            return cost.total
        factor = min(max(seconds / expected, 1 / _MOST_BY_TIME), _MOST_BY_TIME)
        return max(_LEAST_S, cost.total * factor)

    def _total(self, read: float, write: float, choices: int) -> float:
        return max(_LEAST_S, self._reading * read + self._writing * write * choices / self._places)

    def _timed(self, read: float, write: float, seconds: float) -> None:
        """A request with these counts took so long."""
        reading, writing = self._reading * read, self._writing * write
        if seconds <= 0 or reading + writing <= 0:
            return
        error = min(max(seconds / (reading + writing), _LEAST_ERROR), _MOST_ERROR)
        share = reading / (reading + writing)
        # Where most requests hardly read, the first long prompt must still tell what reading takes.
        self._read += share
        self._wrote += 1 - share
        self._reading *= error ** (share * max(_NEW, 1 / max(1.0, self._read)))
        self._writing *= error ** ((1 - share) * max(_NEW, 1 / max(1.0, self._wrote)))
        self._few = not self._writes or min(self._seen, self._read, self._wrote) < 1 / _NEW


def _count(value: Any, default: int) -> int:
    """A whole number that is at least 1, or the default: what a runner will refuse costs nothing here."""
    if type(value) is int and 0 < value <= _MOST_NUMBER:
        return value
    return default


def _megapixels(size: Any) -> float:
    found = _SIZE.fullmatch(size) if isinstance(size, str) and len(size) < 16 else None
    pixels = int(found[1]) * int(found[2]) if found else _SIDE_PIXELS * _SIDE_PIXELS
    return min(max(pixels, 1), 1 << 26) / 1e6
