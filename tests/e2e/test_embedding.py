"""Embeddings: formats, sizes, meaning, usage."""

from __future__ import annotations

import numpy as np
import openai
import pytest

MODEL = "all-minilm-l6-v2"


def embed(client: openai.OpenAI, texts: list[str], **options: object) -> np.ndarray:
    answer = client.embeddings.create(model=MODEL, input=texts, **options)  # type: ignore[arg-type]
    return np.array([row.embedding for row in sorted(answer.data, key=lambda row: row.index)])


def test_float_and_base64_agree(client: openai.OpenAI) -> None:
    texts = ["one", "a longer text of several words"]
    plain, packed = embed(client, texts, encoding_format="float"), embed(client, texts)
    assert plain.shape == (2, 384)
    assert np.allclose(plain, packed, atol=1e-6)
    assert np.allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-4)


def test_dimensions(client: openai.OpenAI) -> None:
    short, full = embed(client, ["cat"], dimensions=128)[0], embed(client, ["cat"])[0]
    assert short.shape == (128,) and np.isclose(np.linalg.norm(short), 1, atol=1e-4)
    assert np.allclose(short, full[:128] / np.linalg.norm(full[:128]), atol=1e-4)
    with pytest.raises(openai.BadRequestError) as caught:
        embed(client, ["cat"], dimensions=4000)
    assert caught.value.param == "dimensions"


def test_paraphrases_are_closer_than_strangers(client: openai.OpenAI) -> None:
    cat, kitten, crash = embed(client, ["a cat", "a kitten", "the stock market crashed"])
    assert cat @ kitten > cat @ crash + 0.3


def test_one_string_token_arrays_and_usage(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model=MODEL, input="hello world")
    assert len(one.data) == 1 and one.usage.prompt_tokens == one.usage.total_tokens > 0
    tokens = client.embeddings.create(model=MODEL, input=[[7592, 2088], [7592]])
    assert len(tokens.data) == 2
    again = client.embeddings.create(model=MODEL, input=[7592, 2088])
    assert np.allclose(again.data[0].embedding, tokens.data[0].embedding, atol=1e-5)


@pytest.mark.parametrize("wrong", ["", [], ["a", ""]])
def test_empty_input(client: openai.OpenAI, wrong: object) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input=wrong)  # type: ignore[arg-type]
    assert caught.value.param and caught.value.param.startswith("input")
