"""A sentence-transformers model in two steps: text to token ids (any thread), token ids to vectors (one)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.runners.spec import RunnerSpec


class Encoder:
    """An embedding model on one device.

    Options of the specification: ``dtype`` ("float32", "float16", "bfloat16"; the weights' own without it)
    and ``trust_remote_code`` (run Python code that comes with the weights; off unless asked for).

    Raises:
        OSError, ValueError: the weights cannot be loaded.
    """

    def __init__(self, spec: RunnerSpec) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        from engine.runners.parked_weights import ParkedWeights

        if not spec.model_dir.is_dir():
            raise FileNotFoundError(f"{spec.model_dir} is not a folder with a sentence-transformers model")
        torch.set_num_threads(spec.threads)
        dtype = spec.options.get("dtype")
        self._torch = torch
        self._model: Any = SentenceTransformer(
            str(spec.model_dir),
            # The environment already limits the visible GPUs to this runner's own.
            device="cuda" if spec.device.startswith("cuda") else "cpu",
            trust_remote_code=bool(spec.options.get("trust_remote_code", False)),
            local_files_only=True,
            model_kwargs={"dtype": dtype} if dtype else {},
        ).eval()
        self._tokenizer: Any = self._model.tokenizer
        config = self._model[0].auto_model.config
        longest = min(filter(None, (config.max_position_embeddings, self._model.max_seq_length)))
        # The trained length unless the specification says otherwise, and never past the position table.
        self.limit: int = min(spec.context_length or longest, config.max_position_embeddings)
        self._model.max_seq_length = self.limit
        self.vocabulary: int = len(self._tokenizer)
        self.dimension: int = self._model.get_embedding_dimension()
        name = self._model.default_prompt_name
        self._prompt: str = self._model.prompts.get(name) or "" if name else ""
        bare = self._ids(["a"], specials=False)[0]
        whole = self._ids(["a"], specials=True)[0]
        self._weights = ParkedWeights([self._model], spec.model_dir)
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self._before, self._after = whole[:start], whole[start + len(bare) :]

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, never cut."""
        return self._ids([self._prompt + text for text in texts], specials=True)

    def complete(self, tokens: Sequence[list[int]]) -> list[list[int]]:
        """Token arrays of a client with the special tokens around them, where they are not there yet."""
        return [row if self._is_whole(row) else [*self._before, *row, *self._after] for row in tokens]

    def encode(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors of unit length, shape (n, dimension), of n token rows."""
        torch = self._torch
        features = self._tokenizer.pad({"input_ids": [list(row) for row in tokens]}, return_tensors="pt")
        with torch.inference_mode():
            moved = {name: tensor.to(self._model.device) for name, tensor in features.items()}
            vectors = self._model(moved)["sentence_embedding"].float()
            unit: NDArray[np.float32] = torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()
        return unit

    def sleep(self) -> None:
        """Gives the weights' memory back; the tokenizer stays."""
        self._weights.put_away()

    def wake(self) -> None:
        """Takes the weights back, see :class:`ParkedWeights` for what may go wrong."""
        self._weights.take_back()

    def _is_whole(self, row: list[int]) -> bool:
        before, after = self._before, self._after
        specials = len(before) + len(after)
        return (
            specials > 0
            and len(row) > specials
            and row[: len(before)] == before
            and row[len(row) - len(after) :] == after
        )

    def _ids(self, texts: list[str], *, specials: bool) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=specials, truncation=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids
