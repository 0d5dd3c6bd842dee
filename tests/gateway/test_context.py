"""The largest context of a plan: counted by the runner only where the body's length leaves a doubt."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.dummy import DummyRunner, House
from tests.gateway.test_meter import bearer, key_under

CHAT = "/v1/chat/completions"


def chat(words: int, **more: Any) -> dict[str, Any]:
    return {"model": "dummy", "messages": [{"role": "user", "content": "word " * words}], **more}


async def test_a_short_body_is_not_counted(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"max_context": 4000})
    assert (await house.post(CHAT, chat(100, max_tokens=500), headers=bearer(token)))[0] == 200
    assert runner.counted == 0


@pytest.mark.parametrize(("words", "output", "status"), [(1900, 100, 200), (1901, 100, 400), (3000, 0, 400)])
async def test_a_long_one_is_held_to_its_tokens(
    house: House, runner: DummyRunner, words: int, output: int, status: int
) -> None:
    token = await key_under(house, {"max_context": 2000})
    told, body, headers = await house.post(CHAT, chat(words, max_tokens=output), headers=bearer(token))
    assert (told, runner.counted) == (status, 1)
    if status == 400:
        assert body["error"]["code"] == "context_length_exceeded"
        assert f"({words} in the prompt, {output} for the answer)" in body["error"]["message"]
        assert headers["x-hearth-charge"] == "0"
        assert runner.seen == []


async def test_the_output_alone_may_be_too_much(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"max_context": 2000})
    told, body, _ = await house.post(CHAT, chat(1, max_completion_tokens=2001), headers=bearer(token))
    assert (told, body["error"]["param"]) == (400, "max_tokens")
    assert runner.counted == 0


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        ("word " * 2001, 400),
        (["word", "word " * 2001], 400),
        (["word " * 1500, "word " * 1500], 200),
        (list(range(2001)), 400),
        ([list(range(1500)), list(range(1500))], 200),
    ],
)
async def test_text_completions_are_held_to_their_longest_prompt(
    house: House, prompt: Any, status: int
) -> None:
    token = await key_under(house, {"max_context": 2000})
    asked = {"model": "dummy", "prompt": prompt}
    told, _, _ = await house.post("/v1/completions", asked, headers=bearer(token))
    assert told == status


async def test_what_is_no_request_is_the_runners_to_refuse(house: House, runner: DummyRunner) -> None:
    token = await key_under(house, {"max_context": 10})
    for asked in ({"model": "dummy", "messages": 5}, {"model": "dummy", "prompt": {}}):
        assert (await house.post(CHAT, asked, headers=bearer(token)))[0] == 200
    assert len(runner.seen) == 2
