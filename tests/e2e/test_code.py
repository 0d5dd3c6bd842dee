"""Code completions: close a simple function; fill in the middle or a clear error."""

from __future__ import annotations

import ast

import openai
import pytest

MODEL = "smollm2-135m-code"


@pytest.mark.parametrize(
    "prompt",
    ["def read_json(path):", "def add(a, b):\n    return"],
)
def test_a_simple_function_is_closed(client: openai.OpenAI, prompt: str) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=64, temperature=0, stop=["\n\n", "\n#", "\n`"]
    )
    code = prompt + answer.choices[0].text
    tree = ast.parse(code)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef) and function.body


def test_streaming(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="def add(a, b):\n    return", max_tokens=12, temperature=0, stream=True
    )
    assert "a + b" in "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_a_suffix_needs_a_template(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="def f():\n", suffix="    return x\n")
    assert caught.value.param == "suffix"
    assert MODEL in caught.value.message
