"""What a client may ask of a detector, in each of its request shapes. Pure.

``/v1/detections`` (JSON or form), LocalAI's ``/v1/detection``, and ``/v1/chat/completions`` with a picture
all become one :class:`DetectionRequest`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ApiError, bad_request, nearest
from engine.runners.media import data_url, decode_base64

DEFAULT_CONFIDENCE = 0.25
DEFAULT_IOU = 0.7
DEFAULT_MAX_DETECTIONS = 300
MOST_DETECTIONS = 1000

#: Class ids and the names that belong to them.
Names = Mapping[int, str]


@dataclass(frozen=True)
class Filters:
    """What may be in the answer; requests with equal ones can run together.

    ``confidence`` and ``iou`` lie in 0..1; ``classes`` are sorted class ids, or None for all.
    """

    confidence: float = DEFAULT_CONFIDENCE
    iou: float = DEFAULT_IOU
    max_detections: int = DEFAULT_MAX_DETECTIONS
    classes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DetectionRequest:
    """A checked request; ``param`` is the field that held the picture."""

    model: str
    image: bytes
    filters: Filters
    param: str = "image"


@dataclass(frozen=True)
class ChatRequest:
    """A detection asked for as a chat completion."""

    detection: DetectionRequest
    stream: bool
    include_usage: bool


def from_json(data: Mapping[str, Any], names: Names) -> DetectionRequest:
    """``{model, image, confidence?, iou?, max_detections?, classes?}``.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    return DetectionRequest(data["model"], picture(data.get("image"), "image"), filters(data, names))


def from_form(fields: Mapping[str, Sequence[str | bytes]], names: Names) -> DetectionRequest:
    """The same fields of a multipart form: ``image`` is a file (or a data URL), ``classes`` may be repeated.

    Args:
        fields: values of each field in order; a file's as bytes.
        names: the model's classes.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    data: dict[str, Any] = {key: values[-1] for key, values in fields.items() if key != "classes"}
    for key, kind in (("confidence", float), ("iou", float), ("max_detections", int)):
        if key in data:
            try:
                data[key] = kind(data[key])
            except (ValueError, UnicodeDecodeError) as error:
                raise _wrong(key, f"'{_cut(data[key])}' is no number") from error
    if "classes" in fields:
        data["classes"] = [part for value in fields["classes"] for part in _listed(value)]
    image = data.get("image")
    file = image if isinstance(image, bytes) else picture(image, "image")
    return DetectionRequest(_text(data["model"]), file, filters(data, names))


def from_localai(data: Mapping[str, Any], names: Names) -> DetectionRequest:
    """``{model, image: base64 or data URL, threshold?}``; a threshold of 0 means the default, as LocalAI has
    it.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    given = data.get("threshold") or None
    image = data.get("image")
    if isinstance(image, str) and image and ":" not in image[:12]:
        content = decode_base64(image, param="image")
    else:
        content = picture(image, "image")
    _check_number("threshold", given)
    return DetectionRequest(data["model"], content, filters({"confidence": given}, names))


def from_chat(data: Mapping[str, Any], names: Names) -> ChatRequest:
    """A chat completion whose last user message has one picture; its text is not read.

    The filters may stand beside ``messages`` (``extra_body`` of the OpenAI clients).

    Raises:
        ApiError: 400 naming the field at fault.
    """
    if data.get("n") not in (None, 1):
        raise _wrong("n", "a detector has one answer; leave it out or send 1")
    stream, options = data.get("stream"), data.get("stream_options")
    if stream is not None and not isinstance(stream, bool):
        raise _wrong("stream", "it must be true or false")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "it must be an object")
    url, param = _chat_picture(data.get("messages"))
    detection = DetectionRequest(data["model"], picture(url, param), filters(data, names), param)
    return ChatRequest(detection, bool(stream), bool((options or {}).get("include_usage")))


def filters(data: Mapping[str, Any], names: Names) -> Filters:
    """The filters of a request, with defaults for what is missing or null.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    confidence, iou, most = data.get("confidence"), data.get("iou"), data.get("max_detections")
    _check_number("confidence", confidence)
    _check_number("iou", iou)
    if most is not None and (
        not isinstance(most, int) or isinstance(most, bool) or not 1 <= most <= MOST_DETECTIONS
    ):
        raise _wrong("max_detections", f"it must be a whole number from 1 to {MOST_DETECTIONS}")
    classes = data.get("classes")
    return Filters(
        DEFAULT_CONFIDENCE if confidence is None else float(confidence),
        DEFAULT_IOU if iou is None else float(iou),
        DEFAULT_MAX_DETECTIONS if most is None else most,
        None if classes is None else class_ids(classes, names),
    )


def class_ids(classes: Any, names: Names) -> tuple[int, ...]:
    """Class ids of names (any case) or ids, sorted and without repetition.

    Raises:
        ApiError: 400 ``unknown_class``, with the nearest known names.
    """
    if isinstance(classes, str | int):
        classes = [classes]
    if not isinstance(classes, list) or not classes:
        raise _wrong("classes", "it must be a non-empty array of class names or ids")
    by_name = {name.lower(): index for index, name in names.items()}
    ids = set()
    for wanted in classes:
        if isinstance(wanted, bool) or not isinstance(wanted, str | int):
            raise _wrong("classes", f"'{_cut(wanted)}' is neither a class name nor an id")
        index = _class_id(wanted, by_name)
        if index is None or index not in names:
            close = nearest(_cut(wanted), names.values())
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else _some(names)
            raise bad_request(
                f"This model does not know the class '{_cut(wanted)}'. {hint}",
                param="classes",
                code="unknown_class",
            )
        ids.add(index)
    return tuple(sorted(ids))


def picture(url: Any, param: str) -> bytes:
    """The bytes of a picture given as a data URL.

    Raises:
        ApiError: 400; a runner fetches nothing, so http(s) URLs are refused too.
    """
    if url is None:
        raise bad_request(f"Missing required field '{param}'.", param=param, code="missing_field")
    if not isinstance(url, str):
        raise _wrong(param, "it must be a string with a URL or data URL")
    return data_url(url, param=param)


def _chat_picture(messages: Any) -> tuple[Any, str]:
    if messages is None:
        raise bad_request("Missing required field 'messages'.", param="messages", code="missing_field")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _wrong("messages", "it must be an array of message objects")
    users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise _wrong("messages", "there is no user message")
    content = messages[users[-1]].get("content")
    found = []
    for place, part in enumerate(content if isinstance(content, list) else []):
        if isinstance(part, dict) and part.get("type") == "image_url":
            where = f"messages.{users[-1]}.content.{place}.image_url"
            holder = part.get("image_url")
            # OpenAI's shape is an object; a bare string is common enough to be understood.
            found.append((holder.get("url"), f"{where}.url") if isinstance(holder, dict) else (holder, where))
    if len(found) != 1:
        raise bad_request(
            f"This is a detection model: the last user message must have exactly one image_url part; it has "
            f"{len(found)}.",
            param="messages",
            code="image_required" if not found else "too_many_images",
        )
    return found[0]


def _class_id(wanted: str | int, by_name: Mapping[str, int]) -> int | None:
    if isinstance(wanted, int):
        return wanted
    text = wanted.strip().lower()
    # Form fields carry ids as text.
    return by_name.get(text, int(text) if text.isdecimal() and len(text) < 10 else None)


def _cut(value: Any) -> str:
    """A client's own value for a message, not at any length."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _wrong(name, "it must be a number from 0 to 1")


def _listed(value: str | bytes) -> list[Any]:
    """One form value of ``classes``: a JSON array, or names or ids with commas between."""
    text = _text(value)
    if text.lstrip().startswith("["):
        try:
            listed: list[Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _wrong("classes", "it is no valid JSON array") from error
        return listed
    return [part for part in text.split(",") if part.strip()]


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _some(names: Names) -> str:
    shown = list(names.values())[:8]
    return f"It knows {len(names)}: {', '.join(shown)}{' ...' if len(names) > len(shown) else ''}."


def _wrong(field: str, reason: str) -> ApiError:
    return bad_request(f"Invalid '{field}': {reason}.", param=field, code="invalid_value")
