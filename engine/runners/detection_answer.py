"""How detections are written for a client, in each answer shape. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.runners.endpoints import DONE, event


@dataclass(frozen=True)
class Detection:
    """One object found; the box's corners are pixels of the given picture, from its upper left corner."""

    label: str
    class_id: int
    confidence: float
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Found:
    """The objects of one picture by falling confidence, and its size in pixels; ``cells``: :func:`usage`."""

    detections: Sequence[Detection]
    width: int
    height: int
    cells: int


def rows(found: Found) -> list[dict[str, Any]]:
    """The list of boxes, as ``data`` of ``/v1/detections`` and as the content of a chat answer."""
    return [
        {
            "label": one.label,
            "class_id": one.class_id,
            "confidence": round(one.confidence, 4),
            "box": {side: round(getattr(one, side), 2) for side in ("x1", "y1", "x2", "y2")},
        }
        for one in found.detections
    ]


def as_list(found: Found, model: str) -> dict[str, Any]:
    """The answer of ``/v1/detections``."""
    size = {"width": found.width, "height": found.height}
    return {"object": "list", "model": model, "data": rows(found), "image": size}


def as_localai(found: Found) -> dict[str, Any]:
    """The answer of LocalAI's ``/v1/detection``: upper left corner and size in pixels."""
    return {
        "detections": [
            {
                "x": round(one.x1, 2),
                "y": round(one.y1, 2),
                "width": round(one.x2 - one.x1, 2),
                "height": round(one.y2 - one.y1, 2),
                "confidence": round(one.confidence, 4),
                "class_name": one.label,
            }
            for one in found.detections
        ]
    }


def usage(found: Found) -> dict[str, int]:
    """A detector has no tokens: counted are the 32-pixel cells that it sees, and the boxes that it gives."""
    boxes = len(found.detections)
    return {"prompt_tokens": found.cells, "completion_tokens": boxes, "total_tokens": found.cells + boxes}


def as_completion(found: Found, model: str, *, id: str, created: int) -> dict[str, Any]:
    """A chat completion whose content is the JSON list of boxes."""
    message = {"role": "assistant", "content": "".join(_pieces(found)), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": usage(found),
    }


def as_chunks(found: Found, model: str, *, id: str, created: int, include_usage: bool) -> Iterator[bytes]:
    """The same as server-sent events, one for each box; their deltas joined are the content."""

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
        return event({**head, "choices": choices, **more})

    def choice(delta: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]

    none: dict[str, Any] = {"usage": None} if include_usage else {}
    yield chunk(choice({"role": "assistant", "content": ""}), **none)
    for piece in _pieces(found):
        yield chunk(choice({"content": piece}), **none)
    yield chunk(choice({}, "stop"), **none)
    if include_usage:
        yield chunk([], usage=usage(found))
    yield DONE


def _pieces(found: Found) -> Iterator[str]:
    """The JSON list of boxes in parts, one a box."""
    if not found.detections:
        yield "[]"
    boxes = rows(found)
    for index, box in enumerate(boxes):
        before = "[" if index == 0 else ", "
        yield before + json.dumps(box, ensure_ascii=False) + ("]" if index == len(boxes) - 1 else "")
