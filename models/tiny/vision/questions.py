"""Questions about a scene in plain words, and their right answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.tiny.vision.palette import COLOURS
from models.tiny.vision.scenes import SHAPES, Scene, article
from models.tiny.vision.wording import (
    TERSE_NUMBER,
    TERSE_WORD,
    THING,
    THINGS,
    WORDINGS,
    expand,
    pick,
    roughen,
)

KINDS: tuple[str, ...] = tuple(WORDINGS)
_WEIGHTS = {"what": 2.0, "describe": 2.0, "count_all": 1.0, "count_some": 2.0, "colour": 1.3, "shape": 1.0}


@dataclass(frozen=True)
class Question:
    """A question, the one answer that counts as right, and its kind (a key of WORDINGS)."""

    kind: str
    text: str
    answer: str


def sample_question(
    rng: np.random.Generator, scene: Scene, kind: str | None = None, held_out: bool = False
) -> Question:
    """A random question about the scene; `held_out` takes it from the wordings that training never sees."""
    if kind is None:
        weights = np.array([_WEIGHTS.get(name, 0.8) for name in KINDS])
        kind = KINDS[rng.choice(len(KINDS), p=weights / weights.sum())]
    wording = WORDINGS[kind]
    phrase = pick(rng, wording.held_out if held_out else wording.trained)
    text, answer, brief = _fill(rng, scene, kind, phrase)
    if brief and not held_out and rng.random() < 0.15:
        endings = TERSE_NUMBER if brief.isdigit() else TERSE_WORD
        return Question(kind, f"{text} {pick(rng, endings)}", brief)
    return Question(kind, text if held_out else roughen(rng, text), answer)


def join(parts: list[str]) -> str:
    """ "a", "a and b" or "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe(scene: Scene) -> str:
    """ "a red circle and 2 blue squares"."""
    return join([group.phrase for group in scene.groups])


def capitalize(text: str) -> str:
    """The text with a capital first letter, the rest as it was."""
    return text[0].upper() + text[1:]


def _fill(rng: np.random.Generator, scene: Scene, kind: str, phrase: str) -> tuple[str, str, str]:
    """The question's text, its answer, and its one-word answer ("" where one word cannot do)."""
    if kind == "what":
        return phrase, capitalize(describe(scene)) + ".", ""
    if kind == "describe":
        ground = f"{article(scene.background)} {scene.background} background"
        sentence = f"The picture shows {describe(scene)} on {ground}."
        return phrase, sentence, ""
    if kind == "background":
        return phrase, f"The background is {scene.background}.", scene.background
    if kind == "count_all":
        return phrase, _there_are(len(scene.items), "shape"), str(len(scene.items))
    if kind == "count_some":
        return _count_some(rng, scene, phrase)
    if kind == "colour":
        return _colour(rng, scene, phrase)
    if kind == "shape":
        return _shape(scene, phrase)
    if kind == "which":
        return _which(rng, scene, phrase)
    if kind == "exists":
        return _exists(rng, scene, phrase)
    raise ValueError(f"unknown kind of question: {kind!r}; known are {', '.join(KINDS)}")


def _there_are(count: int, noun: str) -> str:
    return f"There is 1 {noun}." if count == 1 else f"There are {count} {noun}s."


def _sample_target(rng: np.random.Generator, scene: Scene) -> tuple[str | None, str | None]:
    """A shape, a colour or both to ask for; mostly present in the scene."""
    item = scene.items[rng.integers(len(scene.items))]
    shape, colour = item.shape, item.colour
    if rng.random() < 0.3:
        shape = SHAPES[rng.integers(len(SHAPES))]
    if rng.random() < 0.25:
        colour = COLOURS[rng.integers(len(COLOURS))]
    what = rng.random()
    if what < 0.5:
        return shape, None
    return (None, colour) if what < 0.7 else (shape, colour)


def _count_some(rng: np.random.Generator, scene: Scene, phrase: str) -> tuple[str, str, str]:
    shape, colour = _sample_target(rng, scene)
    count = scene.count(shape, colour)
    noun = " ".join(filter(None, (colour, shape or "shape")))
    asked = f"{colour} {expand(rng, THINGS)}" if shape is None else f"{noun}s"
    return phrase.replace("{them}", asked), _there_are(count, noun), str(count)


def _colour(rng: np.random.Generator, scene: Scene, phrase: str) -> tuple[str, str, str]:
    shapes = sorted({item.shape for item in scene.items})
    shape: str | None = shapes[rng.integers(len(shapes))]
    if (len({item.colour for item in scene.items}) == 1 and rng.random() < 0.4) or "{" not in phrase:
        shape = None
    if "{" in phrase and rng.random() < 0.06:
        shape = SHAPES[rng.integers(len(SHAPES))]
    count = scene.count(shape)
    one = shape or expand(rng, THING)
    text = phrase.replace("{it}", one).replace("{them}", f"{one}s")
    if count == 0:
        return text, f"There are 0 {shape}s.", ""
    colours = [c for c in COLOURS if scene.count(shape, c)]
    noun = shape or "shape"
    answer = f"The {noun} is {colours[0]}." if count == 1 else f"The {noun}s are {join(colours)}."
    return text, answer, colours[0] if len(colours) == 1 else ""


def _shape(scene: Scene, phrase: str) -> tuple[str, str, str]:
    shapes = [s for s in SHAPES if scene.count(s)]
    if len(scene.items) == 1:
        return phrase, f"It is a {shapes[0]}.", shapes[0]
    return phrase, f"They are {join([f'{s}s' for s in shapes])}.", shapes[0] if len(shapes) == 1 else ""


def _which(rng: np.random.Generator, scene: Scene, phrase: str) -> tuple[str, str, str]:
    colour = scene.items[rng.integers(len(scene.items))].colour
    if rng.random() < 0.12:
        colour = COLOURS[rng.integers(len(COLOURS))]
    found = [group.phrase for group in scene.groups if group.colour == colour]
    answer = capitalize(join(found)) + "." if found else f"There are 0 {colour} shapes."
    return phrase.replace("{colour}", colour), answer, ""


def _exists(rng: np.random.Generator, scene: Scene, phrase: str) -> tuple[str, str, str]:
    shape, colour = _sample_target(rng, scene)
    noun = " ".join(filter(None, (colour, shape or "shape")))
    count = scene.count(shape, colour)
    text = phrase.replace("{one}", f"{article(noun)} {noun}").replace("{them}", f"{noun}s")
    if count == 0:
        return text, f"No, there are 0 {noun}s.", "no"
    found = f"is {article(noun)} {noun}" if count == 1 else f"are {count} {noun}s"
    return text, f"Yes, there {found}.", "yes"
