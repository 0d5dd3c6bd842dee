"""The largest context that a plan allows, held against the tokens of a request.

A token is at least one byte of the prompt, so a short enough body is within the limit without counting. Of a
longer one the runner itself counts the tokens, with the model's own tokenizer and chat template.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from engine.errors import ApiError, bad_request
from engine.gateway.upstream import Upstream, UpstreamLostError

log = logging.getLogger("hearth.gateway")

#: The endpoints whose runners count tokens.
PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
#: What chat templates add of their own: a system prompt, the words around tools.
_TEMPLATE_TOKENS = 1024
#: A count is not longer, even with every token's number.
_MOST_COUNT_BYTES = 64 * 1024 * 1024
_RAW_NULL = msgspec.Raw(b"null")


class _Asked(msgspec.Struct):
    """The members that matter; their insides are left as the bytes that came."""

    messages: msgspec.Raw = _RAW_NULL
    prompt: msgspec.Raw = _RAW_NULL
    tools: msgspec.Raw = _RAW_NULL
    chat_template_kwargs: msgspec.Raw = _RAW_NULL
    max_tokens: Any = None
    max_completion_tokens: Any = None


class _Count(msgspec.Struct):
    count: int


_ASKED = msgspec.json.Decoder(_Asked)
_COUNT = msgspec.json.Decoder(_Count)


async def check_context(body: bytes, limit: int, model: str, upstream: Upstream) -> None:
    """Refuses a request whose prompt and `max_tokens` together are more tokens than the plan allows.

    Args:
        body: of a chat or text completion.
        limit: tokens.
        model: for the runner and the message.
        upstream: a ready replica that counts.

    Raises:
        ApiError: 400 `context_length_exceeded`.
    """
    asked = _read(body)
    if asked is None:
        # Not what the endpoint takes: the runner says so.
        return
    output = _positive(asked.max_completion_tokens) or _positive(asked.max_tokens)
    if len(body) + _TEMPLATE_TOKENS + output <= limit:
        return
    if output > limit:
        raise _too_long(limit, None, output)
    prompt = await _longest(asked, model, upstream)
    if prompt is not None and prompt + output > limit:
        raise _too_long(limit, prompt, output)


def _read(body: bytes) -> _Asked | None:
    try:
        return _ASKED.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None


async def _longest(asked: _Asked, model: str, upstream: Upstream) -> int | None:
    """Tokens of the longest prompt; None where they cannot be counted: the runner then has the last word."""
    if bytes(asked.messages) != b"null":
        members = {"model": model, "messages": asked.messages}
        for name in ("tools", "chat_template_kwargs"):
            value: msgspec.Raw = getattr(asked, name)
            if bytes(value) != b"null":
                members[name] = value
        return await _counted(members, upstream)
    prompts = msgspec.json.decode(asked.prompt)
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, list):
        return None
    if prompts and isinstance(prompts[0], int):
        return len(prompts)
    counts = [
        len(each) if isinstance(each, list) else await _counted({"model": model, "prompt": each}, upstream)
        for each in prompts
    ]
    return max((count for count in counts if count is not None), default=None)


async def _counted(members: dict[str, Any], upstream: Upstream) -> int | None:
    headers = {"content-type": "application/json"}
    try:
        answer = await upstream.post("/tokenize", msgspec.json.encode(members), headers)
        try:
            if answer.status != 200:
                return None
            return _COUNT.decode(await answer.read(_MOST_COUNT_BYTES)).count
        finally:
            answer.close()
    except (UpstreamLostError, msgspec.DecodeError) as error:
        log.warning("the tokens of a request to %s could not be counted: %s", members["model"], error)
        return None


def _positive(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _too_long(limit: int, prompt: int | None, output: int) -> ApiError:
    asked = f"{output} tokens of output" if prompt is None else f"{prompt + output} tokens"
    parts = "" if prompt is None else f" ({prompt} in the prompt, {output} for the answer)"
    return bad_request(
        f"The plan of this key allows a context of {limit} tokens; the request asks for {asked}{parts}. "
        "Shorten the prompt, lower max_tokens, or ask the operator for another plan.",
        param="messages" if prompt is not None else "max_tokens",
        code="context_length_exceeded",
    )
