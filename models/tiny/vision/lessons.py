"""Lessons: a picture and several short talks about it, packed into one row of tokens.

The picture comes first and is looked at by all talks of its row; each talk sees the picture and itself,
with the positions that it would have if it stood alone. So one picture is encoded once and teaches many
answers, and none of
them can be copied from another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.tiny.vision.architecture import IMAGE_TOKENS, answer_logits, patch_features, to_input
from models.tiny.vision.batches import draw_batch, step_rng
from models.tiny.vision.questions import sample_question
from models.tiny.vision.records import Record, sample_record
from models.tiny.vision.scenes import Scene
from models.tiny.vision.tokenizer import load_tokenizer
from models.tiny.vision.tokens import ASSISTANT, BOS, EOS, IMAGE, PAD, USER
from models.tiny.vision.wording import NO_IMAGE_ANSWER, OFF_TOPIC, OFF_TOPIC_ANSWER, SYSTEMS, roughen

if TYPE_CHECKING:
    from models.tiny.vision.train import Training

ROW_LENGTH = 256
_PREFIX = [BOS, USER, *[IMAGE] * IMAGE_TOKENS]
_SIGHT_WEIGHT = 0.25

# What a JSON answer says of the picture: each value with the mark after it, and whether a list goes on.
# Also the spaces and brackets between: a grammar allows any blanks there, and a model that never learnt
# what comes after a key would go on with blanks for ever.
_CONTENT = re.compile(
    r'(?<=": )(?:"[^"]*"|\d+).|(?<=":) (?:\[(?:\{"|\]\}))?|(?<=\})(?:, \{"|\])|(?<=[\d"],) (?=")'
)


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `taught` are the (start, end) characters of the answer to learn, None
    for all."""

    question: str
    answer: str
    taught: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Talk:
    """Turns about one picture, or about none."""

    turns: tuple[Turn, ...]
    sees_image: bool = True


@dataclass(frozen=True)
class Rows:
    """Packed rows: `tokens`, `positions` and `wanted` (batch, ROW_LENGTH), `mask` (batch, 1, ROW_LENGTH,
    ROW_LENGTH).

    `wanted` marks the tokens whose successor is to be learnt; `successors` holds those, row by row.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    wanted: Tensor
    successors: Tensor


class Teacher:
    """Makes lessons, with the tokenizer that the finished model will have."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer()

    def pack(self, rng: np.random.Generator, scenes: list[Scene]) -> Rows:
        """One row a scene, filled with talks about it as far as they fit."""
        size = len(scenes)
        tokens = np.full((size, ROW_LENGTH), PAD)
        positions = np.zeros((size, ROW_LENGTH), dtype=np.int64)
        wanted = np.zeros((size, ROW_LENGTH), dtype=bool)
        # 0: the beginning, seen by all; 1: the image, seen by most; from 2 on the talks; -1: nothing.
        owner = np.full((size, ROW_LENGTH), -1)
        blind = np.zeros((size, ROW_LENGTH), dtype=bool)
        start = len(_PREFIX)
        for row, scene in enumerate(scenes):
            tokens[row, :start] = _PREFIX
            positions[row, :start] = np.arange(start)
            owner[row, :2], owner[row, 2:start] = 0, 1
            end, number = start, 2
            while True:
                talk = sample_talk(rng, scene)
                ids, taught = self.encode(talk)
                if end + len(ids) > ROW_LENGTH:
                    break
                here = slice(end, end + len(ids))
                tokens[row, here], owner[row, here] = ids, number
                blind[row, here] = not talk.sees_image
                positions[row, here] = (start if talk.sees_image else 2) + np.arange(len(ids))
                wanted[row, end - 1 : end + len(ids) - 1] |= taught
                end, number = end + len(ids), number + 1
        shared = (owner[:, None, :] == 0) | ((owner[:, None, :] == 1) & ~blind[:, :, None])
        mask = (shared | (owner[:, None, :] == owner[:, :, None])) & np.tri(ROW_LENGTH, dtype=bool)
        flat = torch.from_numpy(tokens)
        chosen = torch.from_numpy(wanted)
        return Rows(
            flat,
            torch.from_numpy(positions),
            torch.from_numpy(mask)[:, None],
            chosen,
            flat.roll(-1, 1)[chosen],
        )

    def encode(self, talk: Talk) -> tuple[list[int], list[bool]]:
        """The talk's tokens after the picture, and which of them are to be learnt."""
        ids: list[int] = []
        taught: list[bool] = []
        for index, turn in enumerate(talk.turns):
            asked = self.tokenizer.encode(turn.question, add_special_tokens=False).ids
            reply = self.tokenizer.encode(turn.answer, add_special_tokens=False)
            mark = [USER] if index else []
            ids += [*mark, *asked, ASSISTANT, *reply.ids, EOS]
            taught += [False] * (len(mark) + len(asked) + 1)
            taught += [_is_taught(turn, a, b) for a, b in reply.offsets] + [True]
        return ids, taught


def sample_talk(rng: np.random.Generator, scene: Scene) -> Talk:
    """A talk about the scene: mostly one question, sometimes two, sometimes nothing to do with it."""
    choice = rng.random()
    if choice < 0.05:
        text = roughen(rng, OFF_TOPIC[rng.integers(len(OFF_TOPIC))])
        return Talk((Turn(_lead(rng) + text, OFF_TOPIC_ANSWER),), sees_image=rng.random() < 0.5)
    if choice < 0.07:
        return Talk((Turn(_lead(rng) + sample_question(rng, scene).text, NO_IMAGE_ANSWER),), sees_image=False)
    if choice < 0.085:
        turn = _record_turn(sample_record(rng, None))
        return Talk((Turn(_lead(rng) + turn.question, turn.answer, turn.taught),), sees_image=False)
    first = sample_turn(rng, scene)
    first = Turn(_lead(rng) + first.question, first.answer, first.taught)
    return Talk((first, sample_turn(rng, scene)) if choice > 0.92 else (first,))


def sample_turn(rng: np.random.Generator, scene: Scene) -> Turn:
    """A question about the scene, answered in words or in JSON."""
    if rng.random() < 0.7:
        question = sample_question(rng, scene)
        return Turn(question.text, question.answer)
    return _record_turn(sample_record(rng, scene))


def _record_turn(record: Record) -> Turn:
    if not record.forced:
        return Turn(record.text, record.answer)
    if record.answer.startswith(('{"shape": ', '{"shapes": ')):
        # The form that a grammar without a schema should fall into: all but the brace itself is learnt.
        return Turn(record.text, record.answer, ((1, len(record.answer)),))
    return Turn(record.text, record.answer, tuple(found.span() for found in _CONTENT.finditer(record.answer)))


def answer_step(
    training: Training, teacher: Teacher, seen_scenes: int, told_scenes: int, rate: float
) -> dict[str, float]:
    """One step of the answer stage; its losses by name.

    So many scenes are seen, and talks are held about the first `told_scenes` of them: a look costs a third
    of a talk, and seeing is what takes the most examples.
    """
    rng = step_rng("answer", training.answer_step, training.seed)
    sight = draw_batch(rng, seen_scenes)
    rows = teacher.pack(rng, sight.scenes[:told_scenes])
    with torch.autocast("cpu", torch.bfloat16):
        features = patch_features(training.model, to_input(sight.pixels))
        seen = training.reader.total(training.reader(features, sight.labels))
        told = features[:told_scenes]
        logits = answer_logits(training.model, told, rows.tokens, rows.positions, rows.mask, rows.wanted)
        said = torch.nn.functional.cross_entropy(logits.float(), rows.successors)
    torch.autograd.backward(said + _SIGHT_WEIGHT * seen)
    training.optimizer.step(rate)
    training.answer_step += 1
    return {"words": float(said.detach()), "sight": float(seen.detach())}


def _lead(rng: np.random.Generator) -> str:
    """What the template puts before the question for a system message; mostly nothing."""
    return SYSTEMS[rng.integers(len(SYSTEMS))] + "\n" if rng.random() < 0.15 else ""


def _is_taught(turn: Turn, start: int, end: int) -> bool:
    return turn.taught is None or any(start >= a and end <= b for a, b in turn.taught)
