"""One curl line per category, to paste into a terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

from engine.runners.spec import Category

#: A 96 by 96 picture of a red square, so that the line works without any file at hand.
_RED_SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAGAAAABgAQMAAADYVuV7AAAABlBMVEX////cHh7/Hx2WAAAAIUlEQVR4"
    "2mNgGAXkAEYGBob/MBYTsswoZ5RDfc4oIA8AAJHeAWAJ6gn/AAAAAElFTkSuQmCC"
)
_SAMPLE_SOUND = "tests/data/jfk.flac"
_SAMPLE_PICTURE = "docs/images/coffee.jpg"


def curl_line(category: Category, model: str, base_url: str, key: str) -> str:
    """A shell command that asks `model` something of its category. `base_url` ends in /v1."""
    if category == "audio":
        return _command(
            base_url + "/audio/transcriptions", key, ["-F", f"model={model}", "-F", f"file=@{_SAMPLE_SOUND}"]
        )
    if category == "detection":
        form = ["-F", f"model={model}", "-F", f"image=@{_SAMPLE_PICTURE}"]
        return _command(base_url + "/detections", key, form)
    path, body = _REQUESTS[category]
    body = {"model": model, **body}
    # Not --json: curl knows it since 7.82 only.
    return _command(base_url + path, key, ["-H", "Content-Type: application/json", "-d", json.dumps(body)])


def curl_lines(models: Iterable[tuple[Category, str]], base_url: str, key: str) -> list[tuple[Category, str]]:
    """The lines of the first model of each category, in the order given."""
    lines: dict[Category, str] = {}
    for category, model in models:
        lines.setdefault(category, curl_line(category, model, base_url, key))
    return list(lines.items())


def _command(url: str, key: str, rest: list[str]) -> str:
    return shlex.join(["curl", "-s", url, "-H", f"Authorization: Bearer {key}", *rest])


_REQUESTS: dict[str, tuple[str, dict[str, object]]] = {
    "chat": (
        "/chat/completions",
        {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0},
    ),
    "code": ("/completions", {"prompt": "def add(a, b):\n    return", "max_tokens": 16, "temperature": 0}),
    "vision": (
        "/chat/completions",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What shape and colour is in this image?"},
                        {"type": "image_url", "image_url": {"url": _RED_SQUARE}},
                    ],
                }
            ]
        },
    ),
    "image": ("/images/generations", {"prompt": "a red circle on a blue background", "size": "256x256"}),
    "embedding": ("/embeddings", {"input": "the quick brown fox"}),
}
