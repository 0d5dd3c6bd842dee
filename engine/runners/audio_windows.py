"""Dynamic batching for Whisper: windows of different requests go through the model together.

faster-whisper transcribes one clip at a time, as a loop over windows of at most 30 s: encode, decode (again
and warmer where the text looks wrong), align words, move on. Its ``BatchedInferencePipeline`` batches the
windows of *one* file and gives up the fallback. Here the loop stays the library's own, one thread for each
clip; only its calls of the model are replaced: each hands its window to a batcher and waits. Windows that
wait at the same time with equal decoding options run as one batch, and a clip that comes while others are
under way joins at the next window.

What is shared stays exact: with CTranslate2's int8 model on CPU, a batch of 2, 4 or 8 windows gave bit for
bit the encodings, tokens and scores that each gives alone. Gain on one CPU core, tiny.en, 8 clips: decoding
1.26 s alone, 1.01 s in fours; encoding the same. A GPU, which one window cannot fill, is what this is for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.runners.batching import Work

#: Runs a call in company and returns its result: (what may share a batch, the call).
Gather = Callable[[Hashable, "Call"], Any]


@dataclass(eq=False)
class Window:
    """30 s of one clip: its mel features (n_mels, 3000), then what the encoder made of them (1500, d)."""

    features: npt.NDArray[np.float32]
    encoded: npt.NDArray[Any] | None = None


@dataclass(eq=False)
class Call:
    """One use of the model on one window; ``options`` are equal for all calls of a batch."""

    window: Window
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


class SharedModel:
    """Stands where a ``WhisperModel`` has its ``ctranslate2.models.Whisper``, and gathers its calls.

    All methods take a :class:`Window` where the original takes the encoder's output, and block.
    """

    def __init__(self, model: Any, gather: Gather) -> None:
        self._model = model
        self._gather = gather

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, window: Window, prompts: list[list[int]], **options: Any) -> list[Any]:
        # CTranslate2 wants the start token at one place in all prompts of a batch.
        key = ("generate", len(prompts[0]), tuple(sorted((k, _hashable(v)) for k, v in options.items())))
        return [self._gather(key, Call(window, (prompts[0],), options))]

    def align(
        self,
        window: Window,
        start_sequence: list[int],
        text_tokens: list[list[int]],
        num_frames: int,
        **options: Any,
    ) -> list[Any]:
        key = ("align", tuple(start_sequence), tuple(sorted(options.items())))
        options = {"start_sequence": start_sequence, **options}
        return [self._gather(key, Call(window, (text_tokens[0], num_frames), options))]

    def detect_language(self, window: Window) -> list[Any]:
        return [self._gather(("detect_language",), Call(window))]


def run_calls(model: Any, key: tuple[Any, ...], works: list[Work[Call]]) -> list[Any]:
    """Runs calls of one key as one batch on the ``ctranslate2.models.Whisper``; one result for each.

    Calls of requests that were cancelled meanwhile are left out; their result, None, is seen by nobody.
    """
    gone = [work.cancelled.is_set() for work in works]  # read once: it may change meanwhile
    live = [work.item for work, left in zip(works, gone, strict=True) if not left]
    if not live:
        return [None] * len(works)
    encoded = _encoded(model, [call.window for call in live])
    options = live[0].options
    if key[0] == "generate":
        results = model.generate(encoded, [call.arguments[0] for call in live], **options)
    elif key[0] == "align":
        tokens, frames = zip(*(call.arguments for call in live), strict=True)
        results = model.align(encoded, text_tokens=list(tokens), num_frames=list(frames), **options)
    else:
        results = model.detect_language(encoded)
    answers = iter(results)
    return [None if left else next(answers) for left in gone]


def _encoded(model: Any, windows: list[Window]) -> Any:
    """The encoder's output for all windows (n, 1500, d), computed for those that have none yet."""
    fresh = [window for window in windows if window.encoded is None]
    if fresh:
        # To host memory: windows of one batch part ways afterwards (fallback, word times), and a row of a
        # device tensor cannot be taken out. It is 4 MB a window for the largest model.
        output = model.encode(_storage(np.stack([window.features for window in fresh])), to_cpu=True)
        for window, row in zip(fresh, np.array(output), strict=True):
            window.encoded = row
    return _storage(np.stack([window.encoded for window in windows if window.encoded is not None]))


def _storage(array: npt.NDArray[Any]) -> Any:
    from ctranslate2 import StorageView

    return StorageView.from_array(np.ascontiguousarray(array))


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, list) else value
