"""The embedding runner: request rules and batching with an encoder without weights, then the real model."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from engine.errors import ApiError
from engine.runners.base import Runner, make_app
from engine.runners.embedding import EmbeddingEngine
from engine.runners.embedding_request import answer, parse, share, shorten, split
from engine.runners.spec import RunnerSpec

DIMENSION, VOCABULARY, LIMIT = 5, 100, 12


class LetterEncoder:
    """Token ids are letters' places between the specials 1 and 2; a vector depends on its own row only."""

    limit, vocabulary, dimension = LIMIT, VOCABULARY, DIMENSION

    def __init__(self, _: object = None) -> None:
        self.calls: list[list[int]] = []

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        return [[1, *(3 + ord(letter) % 90 for letter in text), 2] for text in texts]

    def complete(self, tokens: Sequence[list[int]]) -> list[list[int]]:
        return [[1, *row, 2] for row in tokens]

    def encode(self, tokens: Sequence[Sequence[int]]) -> Any:
        self.calls.append([len(row) for row in tokens])
        rows = np.array([[math.sin(sum(row) * (k + 1)) + 2 for k in range(DIMENSION)] for row in tokens])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Served:
    """The runner's app around the encoder."""

    def __init__(self, client: TestClient, encoder: LetterEncoder) -> None:
        self.client, self.encoder = client, encoder

    def ask(self, given: Any, **over: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/embeddings", json={"model": "letters", "input": given, **over})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def vectors(self, given: Any, **over: Any) -> list[list[float]]:
        return [row["embedding"] for row in self.ask(given, **over)["data"]]

    def refusal(self, body: dict[str, Any]) -> tuple[int, str | None, str | None]:
        answer = self.client.post("/v1/embeddings", json={"model": "letters", **body})
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["code"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    spec = RunnerSpec(
        model="letters",
        aliases=["text-embedding-3-small"],
        category="embedding",
        engine="sentence-transformers",
        model_dir=tmp_path,
        socket=tmp_path / "s",
        max_batch=4,
        max_wait_ms=0,
        options={"batch_tokens": 24},
    )
    encoder = LetterEncoder()
    with TestClient(make_app(EmbeddingEngine(spec, lambda _: encoder), Runner(spec))) as client:
        while client.get("/health").status_code != 200:
            pass
        yield Served(client, encoder)


def test_one_string_many_strings_and_token_arrays(served: Served) -> None:
    one = served.ask("abc")
    assert one["object"] == "list" and one["model"] == "letters"
    assert one["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert [(row["object"], row["index"]) for row in one["data"]] == [("embedding", 0)]
    alone = served.vectors("abc")[0]
    assert served.vectors(["x", "abc"])[1] == alone
    letters = [3 + ord(letter) % 90 for letter in "abc"]
    assert served.vectors(letters) == [alone]
    assert served.vectors([[5], letters])[1] == alone
    assert served.ask("abc", model="text-embedding-3-small")["model"] == "text-embedding-3-small"


def test_base64_is_the_same_vector_as_little_endian_float32(served: Served) -> None:
    (text,) = served.vectors("abc", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == served.vectors("abc")[0]
    assert served.vectors("abc", encoding_format="float") == served.vectors("abc")


def test_dimensions_cut_and_keep_unit_length(served: Served) -> None:
    whole = np.array(served.vectors("abc")[0])
    for dimensions in range(1, DIMENSION + 1):
        cut = np.array(served.vectors("abc", dimensions=dimensions)[0])
        assert cut.shape == (dimensions,)
        assert np.allclose(cut, whole[:dimensions] / np.linalg.norm(whole[:dimensions]), atol=1e-6)
    (text,) = served.vectors("abc", dimensions=2, encoding_format="base64")
    assert len(base64.b64decode(text)) == 8


def test_order_is_kept_and_no_batch_is_over_its_bounds(served: Served) -> None:
    texts = ["abcdefghij"[: 1 + n * 7 % 10] for n in range(50)]
    together = served.vectors(texts)
    assert together == [served.vectors(text)[0] for text in texts]
    for lengths in served.encoder.calls:
        assert len(lengths) <= 4 and (len(lengths) == 1 or len(lengths) * max(lengths) <= 24)
    assert len(served.encoder.calls[0]) > 1


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_field"),
        ({"input": None}, "input", "invalid_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [[]]}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input", "invalid_value"),
        ({"input": ["a", 1]}, "input", "invalid_value"),
        ({"input": [1, "a"]}, "input", "invalid_value"),
        ({"input": [[1], "a"]}, "input", "invalid_value"),
        ({"input": [True]}, "input", "invalid_value"),
        ({"input": [1.5]}, "input", "invalid_value"),
        ({"input": [VOCABULARY]}, "input", "invalid_value"),
        ({"input": [-1]}, "input", "invalid_value"),
        ({"input": {"text": "a"}}, "input", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": "a" * (LIMIT - 1)}, "input", "context_length_exceeded"),
        ({"input": ["a", "a" * 500]}, "input", "context_length_exceeded"),
        ({"input": [5] * LIMIT}, "input", "context_length_exceeded"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": DIMENSION + 1}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": "3"}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": True}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "encoding_format": ["float"]}, "encoding_format", "invalid_value"),
        ({"input": "a", "model": None}, "model", "missing_field"),
    ],
)
def test_what_is_refused(served: Served, body: dict[str, Any], param: str, code: str) -> None:
    assert served.refusal(body) == (400, param, code)


def test_the_edges_are_taken(served: Served) -> None:
    assert len(served.ask("a" * (LIMIT - 2), user="somebody")["data"]) == 1
    assert len(served.ask(["a"] * 2048)["data"]) == 2048
    assert served.refusal({"input": "a", "model": "leters"}) == (404, "model", "model_not_found")


@given(
    st.lists(st.integers(1, 300), max_size=60),
    st.integers(1, 16),
    st.integers(1, 600),
)
def test_split_covers_every_input_once_within_bounds(
    lengths: list[int], max_items: int, max_tokens: int
) -> None:
    batches = split(lengths, max_items=max_items, max_tokens=max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert 1 <= len(batch) <= max_items
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        weight = share(len(batch), longest, max_items=max_items, max_tokens=max_tokens)
        assert len(batch) == 1 or 0 < weight <= 1000
    heads = [lengths[batch[0]] for batch in batches]
    assert heads == sorted(heads, reverse=True)


def test_a_vector_that_is_not_finite_is_never_sent() -> None:
    request = parse({"model": "m", "input": "a"}, dimension=2, vocabulary=9)
    with pytest.raises(RuntimeError, match="not finite"):
        answer(request, np.array([[np.nan, 1]], np.float32), 1)
    kept = shorten(np.array([[0, 0, 1]], np.float32), 2)
    assert kept.tolist() == [[0, 0]]


def test_parse_names_the_offending_token() -> None:
    with pytest.raises(
        ApiError, match=r"token id 100 in item 1 is not in this model's vocabulary \(0 to 99\)"
    ):
        parse({"model": "m", "input": [[1], [100]]}, dimension=2, vocabulary=100)
