"""Questions with their answers, drawn from a random source: what the model learns and is examined in."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from models.tiny.moe.facts import DAYS, GREETINGS, MONTHS, OFF_TOPIC, ORDINALS, TABLES, UNKNOWN, WORDS, Table

#: One question in so many is held out: training never draws it, the exam draws nothing else.
HELD_OUT_SHARE = 20
_LONGEST_LIST = 6


@dataclass(frozen=True)
class Question:
    """One question with its only right answer.

    ``key`` names what is asked: the numbers or the list, whatever the wording; for what is learnt by heart,
    the fact together with its wording.
    """

    kind: str
    key: str
    text: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the exam alone."""
        return zlib.crc32(f"{self.kind}:{self.key}".encode()) % HELD_OUT_SHARE == 0


def _number(rng: random.Random) -> int:
    return rng.randrange(10) if rng.random() < 0.2 else rng.randrange(100)


def _add(rng: random.Random) -> Question:
    a, b = _number(rng), _number(rng)
    words = ("What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.", "What is {a} plus {b}?", "{a} plus {b}")
    return Question("add", f"{a} {b}", rng.choice(words).format(a=a, b=b), f"{a} + {b} = {a + b}")


def _subtract(rng: random.Random) -> Question:
    b, a = sorted((_number(rng), _number(rng)))
    words = (
        "What is {a} - {b}?",
        "{a} - {b} =",
        "Subtract {b} from {a}.",
        "What is {a} minus {b}?",
        "Take {b} from {a}.",
    )
    return Question("subtract", f"{a} {b}", rng.choice(words).format(a=a, b=b), f"{a} - {b} = {a - b}")


def _compare(rng: random.Random) -> Question:
    a, b = rng.sample(range(100), 2)
    more = rng.random() < 0.5
    words = (
        ("Which is larger, {a} or {b}?", "Is {a} or {b} the larger number?", "What is more, {a} or {b}?")
        if more
        else (
            "Which is smaller, {a} or {b}?",
            "Is {a} or {b} the smaller number?",
            "What is less, {a} or {b}?",
        )
    )
    chosen, what = (max(a, b), "larger") if more else (min(a, b), "smaller")
    key = f"{a} {b} {what}"
    return Question("compare", key, rng.choice(words).format(a=a, b=b), f"{chosen} is {what}.")


def _sort(rng: random.Random) -> Question:
    numbers = rng.sample(range(100), rng.randint(2, _LONGEST_LIST))
    words = (
        "Sort these numbers: {x}",
        "Sort {x}",
        "Put these numbers in order: {x}",
        "Sort the numbers {x} from small to large.",
    )
    x = ", ".join(map(str, numbers))
    return Question("sort", x, rng.choice(words).format(x=x), ", ".join(map(str, sorted(numbers))))


def _list(rng: random.Random, least: int = 2) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, _LONGEST_LIST))


def _alphabet(rng: random.Random) -> Question:
    words = (
        "Sort these words: {x}",
        "Put these words in alphabetical order: {x}",
        "Sort alphabetically: {x}",
        "Bring these words into alphabetical order: {x}",
    )
    items = _list(rng)
    x = ", ".join(items)
    return Question("alphabet", x, rng.choice(words).format(x=x), ", ".join(sorted(items)))


def _reverse(rng: random.Random) -> Question:
    words = (
        "Reverse these words: {x}",
        "Say these words backwards: {x}",
        "Reverse the list {x}",
        "Turn this list round: {x}",
    )
    items = _list(rng)
    x = ", ".join(items)
    return Question("reverse", x, rng.choice(words).format(x=x), ", ".join(reversed(items)))


def _count(rng: random.Random) -> Question:
    wanted, *others = rng.sample(WORDS, 3)
    items = [wanted] * rng.randint(0, 5) + rng.choices(others, k=rng.randint(1, 4))
    rng.shuffle(items)
    words = (
        "How many times is {a} in this list: {x}",
        "Count the word {a} in: {x}",
        "How often does {a} appear in: {x}",
        "Count {a}: {x}",
    )
    x = ", ".join(items)
    times = items.count(wanted)
    answer = f"{wanted} appears {times} time{'' if times == 1 else 's'}."
    return Question("count", f"{wanted} {x}", rng.choice(words).format(a=wanted, x=x), answer)


def _length(rng: random.Random) -> Question:
    items = _list(rng)
    words = ("How many words are in this list: {x}", "How long is this list: {x}", "Count the words: {x}")
    x = ", ".join(items)
    return Question("length", x, rng.choice(words).format(x=x), f"The list has {len(items)} words.")


def _pick(rng: random.Random) -> Question:
    items = _list(rng, least=3)
    place = rng.randrange(len(items) + 1)
    name = "last" if place == len(items) else ORDINALS[place]
    words = ("What is the {n} word of: {x}", "Which word is the {n} in this list: {x}", "The {n} word of {x}")
    x = ", ".join(items)
    answer = f"The {name} word is {items[min(place, len(items) - 1)]}."
    return Question("pick", f"{name} {x}", rng.choice(words).format(n=name, x=x), answer)


def _after(rng: random.Random) -> Question:
    later = rng.random() < 0.6
    what = rng.random()
    if what < 0.5:
        number = rng.randrange(1, 999) if rng.random() < 0.5 else rng.randrange(1, 100)
        start, found = str(number), str(number + (1 if later else -1))
    else:
        row = DAYS if what < 0.75 else MONTHS
        place = rng.randrange(len(row))
        start, found = row[place], row[(place + (1 if later else -1)) % len(row)]
    side = "after" if later else "before"
    words = ("What comes {s} {a}?", "Which comes {s} {a}?", "What is {s} {a}?", "Tell me what comes {s} {a}.")
    text = rng.choice(words).format(s=side, a=start)
    key = f"{side} {start}" if start.isdigit() else text
    return Question("after", key, text, f"{found} comes {side} {start}.")


def _fact(table: Table) -> Callable[[random.Random], Question]:
    def draw(rng: random.Random) -> Question:
        a, b = rng.choice(table.pairs)
        text = rng.choice(table.questions).format(a=a)
        return Question(table.kind, text, text, table.answer.format(a=a, b=b, A=a[0].upper() + a[1:]))

    return draw


def _talk(rng: random.Random) -> Question:
    if rng.random() < 0.4:
        text, answer = rng.choice(OFF_TOPIC), UNKNOWN
    else:
        texts, answer = rng.choice(GREETINGS)
        text = rng.choice(texts)
    return Question("talk", text, text, answer)


# Each kind with how often training draws it: the hard ones more often.
_KINDS: dict[str, tuple[float, Callable[[random.Random], Question]]] = {
    "add": (4.0, _add),
    "subtract": (4.0, _subtract),
    "compare": (1.5, _compare),
    "sort": (2.0, _sort),
    "alphabet": (2.0, _alphabet),
    "reverse": (1.0, _reverse),
    "count": (1.5, _count),
    "length": (0.7, _length),
    "pick": (1.0, _pick),
    "after": (1.0, _after),
    **{table.kind: (0.7, _fact(table)) for table in TABLES},
    "talk": (0.7, _talk),
}
KINDS: tuple[str, ...] = tuple(_KINDS)
_WEIGHTS = [weight for weight, _ in _KINDS.values()]


def sample_question(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Question:
    """A question of this kind (None: of any, by weight), from the exam's share or from training's."""
    _, draw = _KINDS[kind or rng.choices(KINDS, _WEIGHTS)[0]]
    while True:
        question = draw(rng)
        if question.held_out == held_out:
            return question


def carelessly(rng: random.Random, text: str) -> str:
    """The text as somebody may type it: at times without capital, without mark, with a please."""
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.!")
    elif text[-1].isalnum() and rng.random() < 0.2:
        text += "."
    if rng.random() < 0.05:
        text = f"Please {text[0].lower()}{text[1:]}"
    return text
