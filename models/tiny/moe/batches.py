"""Training batches: rows packed with short conversations that cannot see each other."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.tiny.moe.facts import SYSTEMS
from models.tiny.moe.questions import carelessly, sample_question
from models.tiny.moe.tokens import ASSISTANT, BOS, EOS, PAD, USER

ROW = 192
_MOST_TURNS = 4


@dataclass(frozen=True)
class Batch:
    """Packed rows; the shapes are those of `architecture.answer_logits`."""

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    # True where the next token is part of an answer (or its end).
    wanted: Tensor
    # The tokens that follow the wanted ones, (number of wanted,).
    targets: Tensor
    # False for padding.
    real: Tensor


def step_rng(step: int, seed: int) -> random.Random:
    """The random source of one step: a resumed run sees what an unbroken one would have seen."""
    return random.Random(f"moe {seed} {step}")


def conversation(rng: random.Random, tokenizer: Any, more: str | None = None) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation and, for each, whether it belongs to an answer.

    ``more``: a kind of question that a third of the questions is to be of, beside its usual share.
    """
    tokens, answers = [BOS], [False]
    system = f"{rng.choice(SYSTEMS)}\n" if rng.random() < 0.2 else ""
    for _ in range(1 if rng.random() < 0.6 else rng.randint(2, _MOST_TURNS)):
        question = sample_question(rng, more if more and rng.random() < 1 / 3 else None)
        asked = tokenizer.encode(system + carelessly(rng, question.text)).ids
        said = tokenizer.encode(question.answer).ids
        tokens += [USER, *asked, ASSISTANT, *said, EOS]
        answers += [False] * (len(asked) + 2) + [True] * (len(said) + 1)
        system = ""
    return tokens, answers


def draw_batch(rng: random.Random, tokenizer: Any, rows: int, more: str | None = None) -> Batch:
    """So many rows, each filled with as many conversations as fit."""
    tokens = torch.full((rows, ROW), PAD)
    positions = torch.zeros((rows, ROW), dtype=torch.long)
    owner = torch.zeros((rows, ROW), dtype=torch.long)
    answer = torch.zeros((rows, ROW), dtype=torch.bool)
    for row in range(rows):
        start, number = 0, 1
        while True:
            ids, answers = conversation(rng, tokenizer, more)
            end = start + len(ids)
            if end > ROW:
                break
            tokens[row, start:end] = torch.tensor(ids)
            positions[row, start:end] = torch.arange(len(ids))
            owner[row, start:end] = number
            answer[row, start:end] = torch.tensor(answers)
            start, number = end, number + 1
    same = owner[:, :, None] == owner[:, None, :]
    mask = (same & torch.ones(ROW, ROW, dtype=torch.bool).tril())[:, None]
    wanted = torch.zeros_like(answer)
    wanted[:, :-1] = answer[:, 1:]
    return Batch(tokens, positions, mask, wanted, tokens[answer], owner > 0)
