"""The token counts that an engine tells in its answer: recorded for information, never charged."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

#: A longer answer (a thousand embeddings, a picture) is not searched for its counts.
MOST_BYTES = 256 * 1024
_MARK = b'"usage"'
#: The largest count that the ledger takes.
_MOST = 2**63 - 1


class Tokens(NamedTuple):
    """Counts of one request; None where the engine told none."""

    prompt: int | None = None
    completion: int | None = None


NONE = Tokens()


class _Counts(msgspec.Struct):
    """Chat and completions name them one way, images and transcriptions another."""

    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    input_tokens: int | float | None = None
    output_tokens: int | float | None = None


class _Answer(msgspec.Struct):
    usage: _Counts | None = None


_DECODER = msgspec.json.Decoder(_Answer)


def tokens_of(body: bytes) -> Tokens:
    """The counts in a whole JSON answer."""
    if len(body) > MOST_BYTES or _MARK not in body:
        return NONE
    try:
        usage = _DECODER.decode(body).usage
    except (msgspec.DecodeError, RecursionError):
        return NONE
    if usage is None:
        return NONE
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    if prompt is None:
        prompt = usage.input_tokens
    if completion is None:
        completion = usage.output_tokens
    return Tokens(_count(prompt), _count(completion))


def tokens_of_events(events: bytes, before: Tokens) -> Tokens:
    """The counts after some more whole events of a stream: those that were told last."""
    if _MARK not in events:
        return before
    found = before
    for line in events.splitlines():
        if line.startswith(b"data:") and _MARK in line:
            told = tokens_of(line[5:].strip())
            found = told if told != NONE else found
    return found


def _count(told: float | None) -> int | None:
    """A count that the ledger can keep; an engine's nonsense is no count."""
    return int(told) if told is not None and 0 <= told <= _MOST else None
