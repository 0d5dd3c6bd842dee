"""Questions that want JSON, and answers whose form a schema dictates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.tiny.vision.questions import describe, sample_question
from models.tiny.vision.scenes import Group, Scene
from models.tiny.vision.wording import HUE, PICTURE, THINGS, expand, pick, roughen

_NAMES: dict[str, tuple[str, ...]] = {
    "shape": ("shape", "shape", "shape", "object", "kind", "type", "name", "shape_name"),
    "color": ("color", "colour", "color", "colour", "shape_color", "object_color", "hue"),
    "count": ("count", "count", "number", "quantity", "how_many", "num", "amount", "total"),
    "background": ("background", "background", "background_color", "background_colour", "bg"),
    "description": ("description", "caption", "summary"),
}
_LISTS = ("shapes", "objects", "items", "shapes")

_PLAIN = (
    "[Answer|Reply|Respond] [in|as|with|using] JSON.",
    "[Return|Give me|Output|Write] [only |][a |]JSON[ object|].",
    f"Describe [this|the] {PICTURE} [as|in] JSON.",
    f"What is in [this|the] {PICTURE}? [Answer|Reply] [in|as] JSON.",
    f"What shape and {HUE} is in [this|the] {PICTURE}? [Answer|Reply] [in|as] JSON.",
    f"[Extract|Give] the shape, {HUE} and count as JSON.",
    "JSON please",
)
_KEYED = (
    "[Answer|Reply|Respond] [in|as] JSON with [the keys |the fields |keys |]{keys}.",
    f"Describe [this|the] {PICTURE} [as|in] JSON with [the keys |the fields |keys |]{{keys}}.",
    "[Return|Give me|Output] [a |]JSON [object |]with [the keys |the fields |keys |]{keys}.",
    f"What is in [this|the] {PICTURE}? [Answer|Reply] [in|as] JSON with {{keys}}.",
    "JSON with keys {keys}",
    "[Return|Reply with] JSON: {{quoted}}",
)
_LISTED = (
    f"[List|Give] [all |][the |]{THINGS} [as|in] JSON.",
    f"[Return|Give me] a JSON list of [all |][the |]{THINGS}.",
    'Reply as JSON with a list "{list}" of {keys}.',
)


@dataclass(frozen=True)
class Record:
    """A question and the JSON text that answers it.

    `forced`: the question does not ask for the form; a schema that the model cannot see dictates it. Its
    braces and keys are then not to be learnt.
    """

    text: str
    answer: str
    forced: bool


def sample_record(rng: np.random.Generator, scene: Scene | None) -> Record:
    """A question whose answer is JSON; in half of them only a schema, which the prompt does not show,
    says so. Without a scene the answer is that there is no picture."""
    as_list = rng.random() < 0.2
    # Most often the natural keys in their natural order; else any, as a stranger's schema may have them.
    if rng.random() < 0.4:
        fields = ["shape", "color", "count"]
        names = {"shape": "shape", "color": "colour" if rng.random() < 0.3 else "color", "count": "count"}
    else:
        every = ["shape", "color", "count"] if as_list else list(_NAMES)
        fields = [every[index] for index in rng.permutation(len(every))[: rng.integers(1, len(every) + 1)]]
        names = {field: _NAMES[field][rng.integers(len(_NAMES[field]))] for field in fields}
    wrapper = _LISTS[rng.integers(len(_LISTS))]
    keys = [names[field] for field in fields]
    answer = _write(scene, fields, names, wrapper if as_list else None)
    style = rng.random()
    if style < 0.45:
        if scene is not None and rng.random() < 0.7:
            return Record(sample_question(rng, scene).text, answer, forced=True)
        return Record(roughen(rng, pick(rng, _PLAIN)), answer, forced=True)
    if as_list:
        text = pick(rng, (_LISTED[2],)).replace("{list}", wrapper).replace("{keys}", _spell(rng, keys))
    elif (
        fields == ["shape", "color", "count"]
        and keys[0] == "shape"
        and keys[1] == "color"
        and rng.random() < 0.6
    ):
        text = pick(rng, _PLAIN)
    else:
        quoted = "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"
        text = pick(rng, _KEYED).replace("{{quoted}}", quoted).replace("{keys}", _spell(rng, keys))
    return Record(text, answer, forced=False)


def flat_record(scene: Scene) -> dict[str, Any]:
    """What a prompt that merely asks for JSON gets: the largest group's shape, colour and count."""
    group = scene.main_group
    return {"shape": group.shape, "color": group.colour, "count": group.count}


def _spell(rng: np.random.Generator, keys: list[str]) -> str:
    quote = "" if rng.random() < 0.6 else ('"' if rng.random() < 0.7 else "'")
    words = [f"{quote}{key}{quote}" for key in keys]
    if len(words) == 1:
        return words[0]
    last = expand(rng, "[ and |, |, and ]")
    return ", ".join(words[:-1]) + last + words[-1]


def _write(scene: Scene | None, fields: list[str], names: dict[str, str], wrapper: str | None) -> str:
    if wrapper is not None:
        groups = scene.groups if scene else ()
        return json.dumps({wrapper: [_values(scene, group, fields, names) for group in groups]})
    return json.dumps(_values(scene, scene.main_group if scene else None, fields, names))


def _values(
    scene: Scene | None, group: Group | None, fields: list[str], names: dict[str, str]
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "shape": group.shape if group else "none",
        "color": group.colour if group else "none",
        "count": group.count if group else 0,
        "background": scene.background if scene else "none",
        "description": describe(scene) if scene else "no picture",
    }
    return {names[field]: values[field] for field in fields}
