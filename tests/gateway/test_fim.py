"""Fill in the middle: suffixes become the prompt that a code model knows."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ApiError
from engine.gateway.fim import fill_in_middle, write_prompt
from engine.routes import ModelRoute
from tests.gateway.dummy import DummyRunner, House, route

TEMPLATE = "<pre>{prefix}<suf>{suffix}<mid>"
CODER = ModelRoute(id="coder", category="code", fim_template=TEMPLATE, fim_stop=["<end>"])
PLAIN = ModelRoute(id="plain", category="code")


def filled(request: dict[str, Any], model: ModelRoute = CODER) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(fill_in_middle(json.dumps(request).encode(), model))
    return parsed


def test_a_suffix_goes_into_the_prompt() -> None:
    got = filled(
        {"model": "coder", "prompt": "def f(", "suffix": "\n    return x", "max_tokens": 9, "seed": 2**40}
    )
    assert got == {
        "model": "coder",
        "prompt": "<pre>def f(<suf>\n    return x<mid>",
        "max_tokens": 9,
        "seed": 2**40,
        "stop": ["<end>"],
    }


@pytest.mark.parametrize(
    ("stop", "after"),
    [(None, ["<end>"]), ("\n", ["\n", "<end>"]), (["a", "<end>"], ["a", "<end>"])],
)
def test_stops_are_kept(stop: Any, after: list[str]) -> None:
    assert filled({"model": "coder", "prompt": "a", "suffix": "b", "stop": stop})["stop"] == after


def test_without_a_suffix_the_very_body_goes_on() -> None:
    for body in (b'{"model":"coder","prompt":"the \\"suffix\\" of it"}', b'{"model":"coder","x":["suffix"]}'):
        assert fill_in_middle(body, CODER) is body


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_suffix_is_none(empty: str | None) -> None:
    assert filled({"model": "plain", "prompt": "a", "suffix": empty}, PLAIN) == {
        "model": "plain",
        "prompt": "a",
    }


@pytest.mark.parametrize(
    ("request_", "model", "param", "code"),
    [
        ({"prompt": "a", "suffix": "b"}, PLAIN, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "suffix": 7}, CODER, "suffix", "invalid_type"),
        ({"prompt": ["a"], "suffix": "b"}, CODER, "prompt", "invalid_type"),
        ({"suffix": "b"}, CODER, "prompt", "invalid_type"),
        ({"prompt": "a", "suffix": "b", "stop": 3}, CODER, "stop", "invalid_type"),
    ],
)
def test_what_cannot_be_filled_is_refused(
    request_: dict[str, Any], model: ModelRoute, param: str, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        filled(request_, model)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


@given(st.text(), st.text())
def test_braces_in_the_text_mean_nothing(prefix: str, suffix: str) -> None:
    for text in (prefix, prefix + "{suffix}{prefix}{0}"):
        assert write_prompt(TEMPLATE, text, suffix) == "<pre>" + text + "<suf>" + suffix + "<mid>"


async def test_through_the_gateway(house: House, runner: DummyRunner) -> None:
    house.serve(
        route("coder", runner, category="code", fim_template=TEMPLATE),
        route("dummy", runner, category="chat"),
    )
    await house.openai.completions.create(model="coder", prompt="a", suffix="b")
    assert json.loads(runner.seen[0][2])["prompt"] == "<pre>a<suf>b<mid>"
    with pytest.raises(openai.BadRequestError) as caught:
        await house.openai.completions.create(model="dummy", prompt="a", suffix="b")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")
