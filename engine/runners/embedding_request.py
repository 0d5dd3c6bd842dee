"""`POST /v1/embeddings`: what a client may ask, and how the answer is written. Pure."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import ApiError, bad_request

Vectors = NDArray[np.float32]

#: OpenAI's own bound.
MAX_INPUTS = 2048


@dataclass(frozen=True)
class EmbeddingRequest:
    """A checked request; exactly one of ``texts`` and ``tokens`` is not empty."""

    model: str
    texts: list[str]
    tokens: list[list[int]]
    dimensions: int | None
    encoding: Literal["float", "base64"]


def parse(data: dict[str, Any], *, dimension: int, vocabulary: int) -> EmbeddingRequest:
    """Checks a request body.

    Args:
        data: the JSON object; unknown fields (``user`` …) are ignored.
        dimension: length of the model's vectors.
        vocabulary: number of the model's token ids.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    texts, tokens = _inputs(data.get("input"), vocabulary) if "input" in data else _missing()
    encoding = data.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise bad_request(
            f"Invalid 'encoding_format': {encoding!r} is neither 'float' nor 'base64'.",
            param="encoding_format",
            code="invalid_value",
        )
    dimensions = data.get("dimensions")
    if dimensions is not None and (not _is_int(dimensions) or not 1 <= dimensions <= dimension):
        raise bad_request(
            f"Invalid 'dimensions': it must be a whole number from 1 to {dimension}, the length of this "
            "model's vectors.",
            param="dimensions",
            code="invalid_value",
        )
    return EmbeddingRequest(data["model"], texts, tokens, dimensions, encoding or "float")


def check_length(tokens: Sequence[Sequence[int]], limit: int) -> None:
    """Raises ApiError: 400 ``context_length_exceeded`` when an input has more than ``limit`` tokens."""
    for index, row in enumerate(tokens):
        if len(row) > limit:
            which = f"Input {index}" if len(tokens) > 1 else "The input"
            raise bad_request(
                f"{which} has {len(row)} tokens; this model takes at most {limit} for one input. "
                "Cut it into parts.",
                param="input",
                code="context_length_exceeded",
            )


def split(lengths: Sequence[int], *, max_items: int, max_tokens: int) -> list[list[int]]:
    """Cuts inputs into batches by what they cost: padded tokens, that is, count times the longest.

    Args:
        lengths: tokens of each input.
        max_items: most inputs of a batch.
        max_tokens: most padded tokens of a batch; a longer input forms a batch alone.

    Returns:
        Batches of indices into ``lengths``, longest inputs first, so that little is padded.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = batches[-1] if batches else []
        if not last or len(last) >= max_items or (len(last) + 1) * lengths[last[0]] > max_tokens:
            batches.append(last := [])
        last.append(index)
    return batches


def shorten(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first ``dimensions`` components of each row, at unit length again.

    Args:
        vectors: rows of unit length, shape (n, dimension).
        dimensions: 1 to dimension, or None for all.
    """
    cut = vectors if dimensions is None else vectors[:, :dimensions]
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    # A row whose kept part is all zero has no direction; it stays zero rather than becoming NaN.
    return np.ascontiguousarray(cut / np.maximum(norms, np.finfo(np.float32).tiny), dtype="<f4")


def answer(request: EmbeddingRequest, vectors: Vectors, prompt_tokens: int) -> bytes:
    """The response body as JSON. Vectors as base64 are little-endian float32.

    Raises:
        RuntimeError: a vector is not finite; sending it would corrupt an index silently.
    """
    if not np.isfinite(vectors).all():
        raise RuntimeError("the model gave a vector that is not finite")
    rows: list[Any] = (
        [base64.b64encode(row.tobytes()).decode() for row in vectors]
        if request.encoding == "base64"
        else vectors.tolist()
    )
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": request.model, "usage": usage})


def share(count: int, longest: int, *, max_items: int, max_tokens: int) -> int:
    """How much of a batch ``count`` inputs of up to ``longest`` tokens fill, in thousandths, rounded up."""
    return math.ceil(1000 * max(count / max_items, count * longest / max_tokens))


def _missing() -> tuple[list[str], list[list[int]]]:
    raise bad_request("Missing required field 'input'.", param="input", code="missing_field")


def _inputs(given: Any, vocabulary: int) -> tuple[list[str], list[list[int]]]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        raise _wrong("it must be a string, an array of strings, or arrays of token ids")
    if not given:
        raise _wrong("it is empty; send at least one text")
    if _is_int(given[0]):
        given = [given]
    if len(given) > MAX_INPUTS:
        raise _wrong(f"it has {len(given)} items; the most is {MAX_INPUTS} in one request")
    if isinstance(given[0], str):
        for index, text in enumerate(given):
            if not isinstance(text, str):
                raise _wrong(f"item {index} is no string as the first one is")
            if not text:
                raise _wrong(
                    f"item {index} is an empty string" if len(given) > 1 else "it is an empty string"
                )
        return given, []
    for index, row in enumerate(given):
        if not isinstance(row, list) or not row:
            raise _wrong(f"item {index} is neither a string nor a non-empty array of token ids")
        for token in row:
            if not _is_int(token):
                raise _wrong(f"item {index} mixes token ids with something else")
            if not 0 <= token < vocabulary:
                raise _wrong(
                    f"token id {token} in item {index} is not in this model's vocabulary "
                    f"(0 to {vocabulary - 1}); use the model's own tokenizer, or send the text"
                )
    return [], given


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(reason: str) -> ApiError:
    return bad_request(f"Invalid 'input': {reason}.", param="input", code="invalid_value")
