"""The many ways in which people ask about a drawn scene.

A phrase may hold choices, `[a|b|c]` (an empty one is a choice too), and slots, `{shape}`, filled by the
question. Phrases behind `held_out` are never trained on; the evaluation asks them to see whether the model
understands wordings that it has not met.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

_CHOICE = re.compile(r"\[([^\[\]]*)\]")

PICTURE = "[image|picture|drawing|photo|scene|picture|image]"
THINGS = "[shapes|objects|figures|things|items|shapes]"
THING = "[shape|object|figure|thing|shape]"
HUE = "[color|colour]"


@dataclass(frozen=True)
class Wording:
    """The phrases of one kind of question: those trained on, and those kept for the evaluation."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS: dict[str, Wording] = {
    "what": Wording(
        (
            f"What shape and {HUE} is in [this|the] {PICTURE}?",
            f"[What|Which] shape and [what |which |]{HUE} [is this|is it|do you see|can you see|is shown]?",
            f"What shape and {HUE} [is|are] in [this|the] {PICTURE}",
            f"[What|Which] {HUE} and shape [is|are] in [this|the] {PICTURE}?",
            f"What [shapes|shape] and [colors|colours|color|colour] are in [this|the] {PICTURE}?",
            f"What is the shape and {HUE} [of the {THING} |]in [this|the] {PICTURE}?",
            f"Name the shape and [the |]{HUE}[.| in this {PICTURE}.]",
            f"[Tell me|Say] [which|what] {THINGS} and [colors|colours] [you see|there are|are shown].",
            f"[Which|What] {THINGS} are [there|in the {PICTURE}|in this {PICTURE}|shown]?",
            f"What {THING} is [there|in the {PICTURE}|in this {PICTURE}|shown here]?",
            f"[List|Name] [all |][the |]{THINGS}[.| in the {PICTURE}.]",
            f"What is drawn [here|in the {PICTURE}|in this {PICTURE}]?",
            f"[Identify|Recognize] the {THING}[ and its {HUE}|].",
            f"Which shape, and in what {HUE}, does the {PICTURE} hold?",
            f"Tell me the {HUE} and the shape you can see in this {PICTURE}.",
            f"[Which|What] shape [and in what|and what|, and which] {HUE}[?| is it?| is there?]",
            f"[Can you tell me|Could you say|Do you know] [what|which] shape and {HUE} [this is|it is|is in the {PICTURE}]?",  # noqa: E501
        ),
        (
            f"Say what shape and what {HUE} this {PICTURE} has.",
            f"Which {HUE} and which shape are there in the {PICTURE}?",
        ),
    ),
    "describe": Wording(
        (
            f"[Describe|Please describe|Can you describe|Could you describe] [the|this] {PICTURE}[.|]",
            f"Describe [what you see|this|it|what is shown][.| in the {PICTURE}.| in this {PICTURE}.]",
            f"What is in [this|the] {PICTURE}?",
            f"What's in [this|the] {PICTURE}?",
            f"What is [on|shown in|shown on|depicted in] [this|the] {PICTURE}?",
            f"What does [this|the] {PICTURE} [show|contain|depict]?",
            "What do you see[?| here?| in this image?| in the picture?]",
            "What can you see[?| here?| in this image?| in the picture?]",
            "What is this?",
            "What's this?",
            f"[Caption|Explain] [this|the] {PICTURE}.",
            f"[Give|Write] [me |]a [short |brief |]caption[.| for this {PICTURE}.]",
            f"[Give|Write] [me |]a [short |brief |one-sentence |detailed |]description[.| of the {PICTURE}.]",
            f"Tell me [about|what is in] [this|the] {PICTURE}.",
            f"Describe [this|the] {PICTURE} in [one|a] [short |]sentence.",
            f"Describe [this|the] {PICTURE} in detail.",
            f"Could you tell me what this {PICTURE} is showing?",
            f"In one sentence, describe the {PICTURE}.",
            f"[Can|Could] you [tell me|say|explain] what [this {PICTURE} shows|the {PICTURE} is showing|is in the {PICTURE}|you see]?",  # noqa: E501
            f"[I want to know|Tell me] what [this|the] {PICTURE} [is|shows|contains|is about].",
        ),
        (f"Please tell me what the {PICTURE} shows.", f"Describe to me what you see in this {PICTURE}."),
    ),
    "count_all": Wording(
        (
            f"How many {THINGS} are [there|in the {PICTURE}|in this {PICTURE}|shown]?",
            f"How many {THINGS} are there in [this|the] {PICTURE}?",
            f"How many {THINGS} [do you see|can you see|can you count|does the {PICTURE} show]?",
            f"Count the {THINGS}[.| in the {PICTURE}.| in this {PICTURE}.]",
            f"What is the [total |]number of {THINGS}?",
            "[How many are there|How many]?",
            f"Can you count the {THINGS} in the {PICTURE}?",
            f"How many {THINGS} does this {PICTURE} have in all?",
            f"[Could|Can] you [tell me|say|count] how many {THINGS} there are?",
            f"How many {THINGS} [have been drawn|are drawn|in total|altogether|are there in all]?",
        ),
        (f"How many {THINGS} can be seen in the {PICTURE}?", f"Tell me how many {THINGS} there are."),
    ),
    "count_some": Wording(
        (
            "How many {them} are there?",
            f"How many {{them}} are [in the {PICTURE}|in this {PICTURE}|shown|visible]?",
            f"How many {{them}} are there in [this|the] {PICTURE}?",
            "How many {them} [do you see|can you see|can you count]?",
            f"How many {{them}} does [this|the] {PICTURE} [show|have|contain]?",
            f"Count the {{them}}[.| in the {PICTURE}.| in this {PICTURE}.]",
            "[What is the|Tell me the] number of {them}?",
            "How many {them}?",
            f"Can you count the {{them}} in the {PICTURE}?",
            "How many {them} have been drawn?",
            "[Could|Can] you [tell me|say] how many {them} there are?",
            "How many {them} [are drawn|in total|altogether|are there in all]?",
        ),
        ("How many {them} can be seen?", f"Tell me how many {{them}} there are in this {PICTURE}."),
    ),
    "colour": Wording(
        (
            f"What {HUE} is the {{it}}?",
            f"What is the {HUE} of the {{it}}?",
            f"[Which|What] {HUE} does the {{it}} have?",
            f"Which {HUE} is the {{it}}?",
            f"[Tell me|Name] the {HUE} of the {{it}}.",
            f"What {HUE} are the {{them}}?",
            f"[Which|What] {HUE} is the {{it}} in [this|the] {PICTURE}?",
            f"What {HUE} is it?",
            f"In what {HUE} is the {{it}} drawn?",
            f"The {{it}} has which {HUE}?",
            f"[Could|Can] you [tell me|say] [which|what] {HUE} the {{it}} [is|has]?",
            f"The {{it}} is [which|what] {HUE}?",
        ),
        (f"Tell me what {HUE} the {{it}} is.", f"What is the {HUE} of the {{it}} in the {PICTURE}?"),
    ),
    "shape": Wording(
        (
            "[What|Which] shape is [it|this|that]?",
            f"[What|Which] shape is [in|shown in] [this|the] {PICTURE}?",
            f"What [kind|type|sort] of shape is [it|this|in the {PICTURE}|shown|that]?",
            "[What|Which] shape [do|can] you see?",
            "What is the shape[?| called?| of the object?| of the figure?]",
            "What shapes are [these|they|those]?",
            f"What geometric [shape|figure] is [this|in this {PICTURE}|shown]?",
            "Name the shape.",
            f"The {PICTURE} shows which shape?",
            "Which geometric form is this?",
            "[Could|Can] you [tell me|say] [which|what] shape [this|it|that] is?",
            f"[Which|What] shape [is drawn|has been drawn|does this {PICTURE} have|are they|is there]?",
        ),
        (f"What shape does the {PICTURE} show?", "Tell me what shape it is."),
    ),
    "which": Wording(
        (
            "[Which|What] shape is {colour}?",
            "[Which|What] [object|figure|thing|item] is {colour}?",
            "What is {colour}?",
            "[Which|What] {colour} [shape|object] [is there|do you see]?",
            "What shape is the {colour} [one|object|thing|figure]?",
            "[Which|What] shapes are {colour}?",
            "What shape does the {colour} thing have?",
            "What [shape|form] [does|has] the {colour} [thing|object|figure] [have|got|]?",
        ),
        ("Tell me which shape is {colour}.",),
    ),
    "exists": Wording(
        (
            f"Is there {{one}}[?| in the {PICTURE}?| in this {PICTURE}?| here?]",
            "[Do|Can] you see {one}?",
            f"Does [this|the] {PICTURE} [show|contain|have] {{one}}?",
            "Are there any {them}[?| here?| in this image?| in the picture?]",
            "[Do|Can] you see any {them}?",
            f"Has this {PICTURE} got {{one}} in it?",
            f"Has [this|the] {PICTURE} [got |]{{one}}?",
            f"[Could|Can] you [find|spot|see] {{one}} [in the {PICTURE}|here|]?",
            "Is {one} [there|here|shown|visible|drawn]?",
            "Does it [have|show|contain] {one}?",
        ),
        (f"Can {{one}} be seen in this {PICTURE}?", f"Is {{one}} in the {PICTURE}?"),
    ),
    "background": Wording(
        (
            f"What {HUE} is the background?",
            f"What is the [background {HUE}|{HUE} of the background]?",
            f"[Which|What] {HUE} does the background have?",
            f"Which {HUE} is the background[?| in this {PICTURE}?]",
            f"[Tell me|Name] the {HUE} of the background.",
            "What is the background?",
            f"[Which|What] {HUE} is behind the {THINGS}?",
            f"background {HUE}?",
            f"In what {HUE} is the background painted?",
            f"[Could|Can] you [tell me|say] [which|what] {HUE} the background [is|has]?",
        ),
        (f"Tell me what {HUE} the background is.",),
    ),
}

TERSE_WORD = (
    "Answer [with|in] one word.",
    "[One word|One word only|Just one word].",
    "Reply with a single word.",
)
TERSE_NUMBER = (
    "[Just|Only] the number.",
    "Answer with [a|one] number[ only|].",
    "Reply with [a|the] number[ only|].",
    "Give [just|only] the number.",
)

OPENINGS = (
    "Hi! ",
    "Hello! ",
    "Hello, ",
    "Please ",
    "Look at this picture. ",
    "Look at the image. ",
    "Quick question: ",
)
CLOSINGS = (
    " Thanks.",
    " Thank you!",
    " Please.",
    " Be brief.",
    " Answer briefly.",
    " Answer in one sentence.",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a vision assistant.",
    "You are an assistant that answers questions about images.",
    "Answer briefly.",
    "Be concise.",
    "You are Hearth, a friendly and helpful assistant.",
    "Answer the question about the image.",
    "You describe pictures for people who cannot see them.",
    "You are a careful assistant. Look at the picture, then answer the user's question in one short sentence.",  # noqa: E501
    "You are a helpful assistant. Always answer truthfully and keep to what you can see.",
)

OFF_TOPIC = (
    "Hello", "Hi", "hey there", "How are you?", "Who are you?", "What is your name?", "What can you do?",
    "Tell me a joke.", "What is the capital of France?", "What is the capital of Germany?", "Write a poem.",
    "Write a Python function that adds two numbers.", "What is 2 + 2?", "What is 17 * 23?",
    "What time is it?",
    "Translate 'good morning' into French.", "Who wrote Hamlet?", "What's the weather today?", "Say hello.",
    "Explain quantum mechanics.", "Summarize this text.", "Tell me a story.", "What is the meaning of life?",
    "How do I bake bread?", "Who is the president of the United States?", "Sing a song.", "Good morning!",
    "Can you help me?", "Thanks!", "What day is it?", "Recommend a book.", "How tall is Mount Everest?",
    "Which planet is the largest?", "What is machine learning?", "def add(a, b):", "test", "ping",
    "Count to ten.",
    "Why is the sky blue?", "Do you like music?", "Where is the Eiffel Tower?",
    "Repeat after me: hello world",
    "List three fruits.", "What is the square root of 16?", "Name a famous star in the sky.", "Hello, world!",
    "Is there a person in the picture?", "How many cats are there?", "How many people are in this image?",
    "What animal is this?", "Is there a dog?", "What does the text say?", "Read the text in the image.",
    "Is it day or night?", "What is the man doing?",
)  # fmt: skip
OFF_TOPIC_ANSWER = "I can only describe drawn shapes: their kind, colour and number."
NO_IMAGE_ANSWER = "I see no picture. Please send one: I describe drawn shapes."


def expand(rng: np.random.Generator, phrase: str) -> str:
    """The phrase with each of its choices made; slots stay."""
    while found := _CHOICE.search(phrase):
        options = found[1].split("|")
        phrase = phrase[: found.start()] + options[rng.integers(len(options))] + phrase[found.end() :]
    return phrase


def pick(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    """One of the phrases, its choices made."""
    return expand(rng, phrases[rng.integers(len(phrases))])


def roughen(rng: np.random.Generator, text: str) -> str:
    """The text as somebody might type it: greetings and thanks, other cases, a mark forgotten."""
    if rng.random() < 0.08:
        opening = OPENINGS[rng.integers(len(OPENINGS))]
        text = opening + (text[0].lower() + text[1:] if not opening.endswith(". ") else text)
    if rng.random() < 0.08:
        text += CLOSINGS[rng.integers(len(CLOSINGS))]
    habit = rng.random()
    if habit < 0.12:
        return text.lower()
    if habit < 0.15:
        return text.upper()
    if habit < 0.25:
        return text.rstrip("?.! ")
    return text
