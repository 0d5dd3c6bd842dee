"""The embedding runner: sentence-transformers behind ``POST /v1/embeddings``.

Texts are tokenised off the event loop, cut into batches by their padded tokens (long inputs in one batch are
what blows memory up), and run with the texts of other requests that wait. A request's batches go through the
queue one after another, so a large request does not hold up the small ones.

Options: ``batch_tokens`` (most padded tokens that run together; default 2048 on CPU, where more gain nothing
and only make others wait, and 16384 on a GPU), and those of :class:`Encoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.runners.base import Runner, endpoint, serve
from engine.runners.batching import Work
from engine.runners.embedding_encoder import Encoder
from engine.runners.embedding_request import Vectors, answer, check_length, parse, share, shorten, split
from engine.runners.endpoints import read_json
from engine.runners.spec import RunnerSpec

DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

Rows = Sequence[Sequence[int]]


class Encodes(Protocol):
    """What this runner needs of an embedding model; see :class:`Encoder`."""

    limit: int
    vocabulary: int
    dimension: int

    def tokenise(self, texts: list[str]) -> list[list[int]]: ...

    def complete(self, tokens: Sequence[list[int]]) -> list[list[int]]: ...

    def encode(self, tokens: Rows) -> Vectors: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class EmbeddingEngine:
    """Serves one embedding model."""

    def __init__(self, spec: RunnerSpec, make: Callable[[RunnerSpec], Encodes] = Encoder) -> None:
        self._spec = spec
        self._make = make
        self._max_items = spec.max_batch
        kind = "cuda" if spec.device.startswith("cuda") else "cpu"
        self._max_tokens = int(spec.options.get("batch_tokens", DEFAULT_BATCH_TOKENS[kind]))
        self._encoder: Encodes

    def load(self) -> None:
        self._encoder = self._make(self._spec)

    def sleep(self) -> None:
        self._encoder.sleep()

    def wake(self) -> None:
        self._encoder.wake()

    def routes(self, runner: Runner) -> list[Route]:
        batcher = runner.batcher(self.run, weigh=self._share, max_weight=1000)

        async def embeddings(request: Request) -> Response:
            data = await read_json(request)
            runner.check_model(data.get("model"))
            encoder = self._encoder
            asked = parse(data, dimension=encoder.dimension, vocabulary=encoder.vocabulary)
            if asked.texts:
                tokens = await runner.offload(encoder.tokenise, asked.texts)
            else:
                tokens = encoder.complete(asked.tokens)
            check_length(tokens, encoder.limit)
            vectors = np.empty((len(tokens), encoder.dimension), dtype=np.float32)
            for batch in self._split([len(row) for row in tokens]):
                vectors[batch] = await batcher.submit("", [tokens[index] for index in batch])
            total = sum(map(len, tokens))
            body = await runner.offload(lambda: answer(asked, shorten(vectors, asked.dimensions), total))
            return Response(body, media_type="application/json")

        return [Route("/v1/embeddings", endpoint(embeddings), methods=["POST"])]

    def run(self, _: Hashable, works: list[Work[Rows]]) -> list[Vectors | Exception]:
        """Encodes the rows of several requests; called in the batcher's thread."""
        wanted = [work for work in works if not work.cancelled.is_set()]
        rows = [row for work in wanted for row in work.item]
        vectors = np.empty((len(rows), self._encoder.dimension), dtype=np.float32)
        for batch in self._split([len(row) for row in rows]):
            vectors[batch] = self._encoder.encode([rows[index] for index in batch])
        results: list[Vectors | Exception] = []
        taken, place = set(map(id, wanted)), 0  # not asked again: one may have been cancelled meanwhile
        for work in works:
            size = len(work.item) if id(work) in taken else 0
            results.append(vectors[place : place + size])
            place += size
        return results

    def _split(self, lengths: list[int]) -> list[list[int]]:
        return split(lengths, max_items=self._max_items, max_tokens=self._max_tokens)

    def _share(self, rows: Rows) -> int:
        longest = max(map(len, rows))
        return share(len(rows), longest, max_items=self._max_items, max_tokens=self._max_tokens)


if __name__ == "__main__":
    serve(EmbeddingEngine)
