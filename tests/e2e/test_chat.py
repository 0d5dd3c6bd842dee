"""Chat through the real OpenAI client: everything that issue asks of a chat model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

MODEL = "smollm2-135m-instruct"
PARIS: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
LINTER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "run_linter",
            "description": "Run a linter on Python source code and return what it finds.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "Python source code."}},
                "required": ["code"],
            },
        },
    }
]


def test_paris(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=32)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None and answer.usage.prompt_tokens > 0
    assert answer._request_id


def test_streaming_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=PARIS,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert len(chunks) > 3
    assert chunks[-1].choices == [] and chunks[-1].usage is not None


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Give me a JSON object with a key 'city' set to Paris."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=128,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 24},
            "country": {"type": "string", "enum": ["France", "Germany"]},
        },
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=PARIS,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
        temperature=0,
        max_tokens=96,
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"city", "country"} and found["country"] == "France"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "run_linter"}}])
def test_a_tool_is_called_when_it_must_be(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Lint this code: x=1"}],
        tools=LINTER,
        tool_choice=choice,
        temperature=0,
        max_tokens=128,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].type == "function" and calls[0].function.name == "run_linter"
    assert isinstance(json.loads(calls[0].function.arguments)["code"], str)


def test_tool_choice_auto_and_none_answer(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model=MODEL, messages=PARIS, tools=LINTER, tool_choice=choice, temperature=0, max_tokens=64
        )
        message = answer.choices[0].message
        assert message.content or message.tool_calls
        if choice == "none":
            assert not message.tool_calls


def test_tool_results_are_read(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "What is the secret word? Use the tool."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "secret_word", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "The secret word is banana."},
    ]
    tools: list[Any] = [
        {"type": "function", "function": {"name": "secret_word", "parameters": {"type": "object"}}}
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=tools, temperature=0, max_tokens=48
    )
    assert "banana" in (answer.choices[0].message.content or "").lower()


def test_stop_seed_logprobs_and_n(client: openai.OpenAI) -> None:
    stopped = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=32, stop=["France"]
    )
    assert "France" not in (stopped.choices[0].message.content or "")
    assert stopped.choices[0].finish_reason == "stop"

    def sample() -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=PARIS, temperature=1.0, seed=7, max_tokens=24
        )
        return answer.choices[0].message.content or ""

    assert sample() == sample()

    many = client.chat.completions.create(
        model=MODEL, messages=PARIS, n=3, temperature=1.0, max_tokens=8, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    for choice in many.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_the_seed_program_of_a_code_assistant(client: openai.OpenAI, capsys: Any) -> None:
    """Seed program (a): system message, a tool, streaming, the deltas printed."""
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are a careful code reviewer."},
            {"role": "user", "content": "Check this for style: def f(x):return x"},
        ],
        tools=LINTER,
        stream=True,
        temperature=0,
        max_tokens=96,
    )
    finish = None
    for chunk in stream:
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        if delta.content:
            print(delta.content, end="", flush=True)
        for call in delta.tool_calls or []:
            if call.function:
                print(call.function.name or "", call.function.arguments or "", end="", flush=True)
        finish = chunk.choices[0].finish_reason or finish
    assert capsys.readouterr().out.strip()
    assert finish in ("stop", "tool_calls", "length")


def test_context_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}])
    assert caught.value.code == "context_length_exceeded"
