"""Windows of several clips through one model: batched, never mixed, each with its own answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from engine.runners.audio_windows import Call, SharedModel, Window, run_calls
from engine.runners.batching import Work


class FakeWhisper:
    """Encodes a window as its first feature; "decodes" it to that number and its options."""

    def __init__(self) -> None:
        self.ran: Counter[tuple[str, int]] = Counter()

    def encode(self, features: Any, to_cpu: bool) -> Any:
        array = np.array(features)
        assert to_cpu
        self.ran["encode", len(array)] += 1
        return array[:, :1, :1]

    def generate(self, encoded: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
        rows = np.array(encoded)
        self.ran["generate", len(rows)] += 1
        assert len({len(prompt) for prompt in prompts}) == 1 and len(prompts) == len(rows)
        return [(int(row[0, 0]), prompt, options) for row, prompt in zip(rows, prompts, strict=True)]

    def align(
        self, encoded: Any, start_sequence: Any, text_tokens: Any, num_frames: Any, **_: Any
    ) -> list[Any]:
        rows = np.array(encoded)
        self.ran["align", len(rows)] += 1
        return [(int(row[0, 0]), *rest) for row, *rest in zip(rows, text_tokens, num_frames, strict=True)]

    def detect_language(self, encoded: Any) -> list[Any]:
        return [[("<|en|>", float(row[0, 0]))] for row in np.array(encoded)]


def window(number: int) -> Window:
    return Window(np.full((2, 4), number, np.float32))


class Recorder:
    """A gather that keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Call]] = []

    def __call__(self, key: Any, call: Call) -> Any:
        self.asked.append((key, call))
        return "answer"


def works(calls: list[Call]) -> list[Work[Call]]:
    return [Work(call) for call in calls]


def test_each_gets_its_own_answer_in_one_batch() -> None:
    model, asked = FakeWhisper(), Recorder()
    shared = SharedModel(model, asked)
    for number in range(4):
        assert shared.generate(window(number), [[1, number]], beam_size=5) == ["answer"]
    keys = [key for key, _ in asked.asked]
    assert len(set(keys)) == 1
    answers = run_calls(model, keys[0], works([call for _, call in asked.asked]))
    assert answers == [(number, [1, number], {"beam_size": 5}) for number in range(4)]
    assert model.ran == {("encode", 4): 1, ("generate", 4): 1}


def test_what_must_not_share_a_batch_has_another_key() -> None:
    asked = Recorder()
    shared = SharedModel(FakeWhisper(), asked)
    shared.generate(window(0), [[1]], beam_size=5, suppress_tokens=(1, 2))
    shared.generate(window(0), [[1]], beam_size=1, suppress_tokens=(1, 2))
    shared.generate(window(0), [[1]], beam_size=5, suppress_tokens=[3])
    shared.generate(window(0), [[1, 2]], beam_size=5, suppress_tokens=(1, 2))
    shared.align(window(0), [1], [[5]], 300, median_filter_width=7)
    shared.align(window(0), [2], [[5]], 300, median_filter_width=7)
    shared.detect_language(window(0))
    keys = [key for key, _ in asked.asked]
    assert len(set(keys)) == len(keys)


def test_a_window_is_encoded_once() -> None:
    model = FakeWhisper()
    first, second = window(1), window(2)
    run_calls(model, ("detect_language",), works([Call(first)]))
    answers = run_calls(model, ("generate",), works([Call(first, ([0],)), Call(second, ([0],))]))
    assert [answer[0] for answer in answers] == [1, 2]
    run_calls(model, ("align",), works([Call(w, ([7], 9), {"start_sequence": [0]}) for w in (first, second)]))
    assert model.ran == {("encode", 1): 2, ("generate", 2): 1, ("align", 2): 1}


def test_what_was_cancelled_is_not_computed() -> None:
    model = FakeWhisper()
    batch = works([Call(window(number), ([0],)) for number in range(3)])
    batch[1].cancelled.set()
    answers = run_calls(model, ("generate",), batch)
    assert [answer and answer[0] for answer in answers] == [0, None, 2]
    assert model.ran["encode", 2] == 1
    for work in batch:
        work.cancelled.set()
    assert run_calls(model, ("generate",), batch) == [None] * 3


def test_the_rest_is_the_models_own() -> None:
    model = FakeWhisper()
    assert SharedModel(model, Recorder()).ran is model.ran
