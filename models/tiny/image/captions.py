"""What a person might type for a scene: training wordings, held-out wordings, and words nobody taught.

Wordings are put together from parts (an opening, the shape, the background, an ending). Words outside the
vocabulary are trained as ``zzz``, which the tokenizer reads as its unknown token, so that a prompt may hold
any word.
"""

from __future__ import annotations

import random

from models.tiny.image.drawing import Scene, plain_background

#: What else a shape is called.
OTHER_NAMES = {"circle": ("disc", "ball", "dot"), "square": ("box",), "triangle": ()}
OPENINGS = (
    "",
    "a picture of",
    "picture of",
    "an image of",
    "a photo of",
    "a drawing of",
    "draw",
    "draw me",
    "please draw",
    "paint",
    "show me",
    "make",
    "create an image of",
    "generate a picture of",
    "generate",
    "i want",
)
SHAPES_FIRST = (
    "{a_colour} {shape}",
    "{a_colour} {shape}",
    "{a_colour} {shape}",
    "{colour} {shape}",
    "{colour} {shape}",
    "the {colour} {shape}",
    "one {colour} {shape}",
    "a solid {colour} {shape}",
    "a simple {colour} {shape}",
    "a bright {colour} {shape}",
    "a {shape} in {colour}",
    "a {shape} that is {colour}",
)
BACKGROUNDS = (
    " on {a_back} background",
    " on {a_back} background",
    " on {a_back} background",
    " on {back} background",
    " on {back}",
    " on the {back} background",
    " on a plain {back} background",
    " with {a_back} background",
    " against {a_back} background",
    " in front of {a_back} background",
    ", {back} background",
    ", {a_back} background",
    " and {a_back} background",
    ". the background is {back}",
)
BACKGROUNDS_FIRST = (
    "{a_back} background with ",
    "{back} background with ",
    "on {a_back} background, ",
    "on {back}, ",
    "{back} background, ",
)
ENDINGS = ("", "", "", ".", ".", "!", ", please", " please.")

#: Never trained on; some of their words are not in the vocabulary.
HELD_OUT_WORDINGS = (
    "please paint one {colour} {shape} over {a_back} background",
    "{a_colour} {shape} drawn on {a_back} background",
    "i would like {a_colour} {shape} placed on {a_back} background",
    "{a_back} backdrop and {a_colour} {shape}",
    "Can you make {a_colour} {shape} with {a_back} background?",
)


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def phrase(wording: str, scene: Scene, shape: str | None = None) -> str:
    """The scene in a wording; ``{a_colour}`` and ``{a_back}`` take an article."""
    return wording.format(
        a_colour=article(scene.colour),
        a_back=article(scene.background),
        colour=scene.colour,
        back=scene.background,
        shape=shape or scene.shape,
    )


def random_caption(scene: Scene, rng: random.Random) -> str:
    """One training caption of the scene.

    A scene on its plain background loses the mention of it half of the time, so that "blue square" has a
    meaning of its own.
    """
    other = OTHER_NAMES[scene.shape]
    shape = rng.choice(other) if other and rng.random() < 0.15 else scene.shape
    what = rng.choice(SHAPES_FIRST)
    roll = rng.random()
    if scene.background == plain_background(scene.colour) and roll < 0.5:
        wording = f"{rng.choice(OPENINGS)} {what}"
    elif roll < 0.8:
        wording = f"{rng.choice(OPENINGS)} {what}{rng.choice(BACKGROUNDS)}"
    else:
        wording = rng.choice(BACKGROUNDS_FIRST) + what
    text = phrase(wording.strip() + rng.choice(ENDINGS), scene, shape)
    return with_unknown_words(text, {scene.colour, scene.background, shape}, rng)


def with_unknown_words(text: str, keep: set[str], rng: random.Random) -> str:
    """The caption, sometimes with unknown words around it or in place of words that are not in ``keep``."""
    roll = rng.random()
    if roll < 0.1:
        return "zzz " * rng.randint(1, 6) + text
    if roll < 0.2:
        return text + " zzz" * rng.randint(1, 6)
    if roll < 0.35:
        words = text.split()
        return " ".join("zzz" if w.strip(".,!") not in keep and rng.random() < 0.25 else w for w in words)
    return text


def every_training_word() -> set[str]:
    """All text that training captions are made of, as raw parts (the vocabulary is cut from them)."""
    names = {name for names in OTHER_NAMES.values() for name in names}
    return {*OPENINGS, *SHAPES_FIRST, *BACKGROUNDS, *BACKGROUNDS_FIRST, *ENDINGS, *names, "a an"}
