"""SmolLM2's chat template: the original's outcome without tools, and what Hermes models read with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.catalog import CATALOG_DIR

DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LINTER = {
    "type": "function",
    "function": {
        "name": "run_linter",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "Lint this."}


def render(messages: list[dict[str, Any]], **more: Any) -> str:
    # As transformers makes it.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((CATALOG_DIR / "templates" / "smollm2.jinja").read_text())
    return template.render(messages=messages, **{"add_generation_prompt": True, **more})


def original(messages: list[dict[str, str]]) -> str:
    """The template that comes with the weights, by hand."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT}, *messages]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "Be short."}, USER],
        [USER, {"role": "assistant", "content": "Done."}, {"role": "user", "content": "Again."}],
        [USER, {"role": "system", "content": "Late."}, USER],
    ],
)
def test_without_tools_it_is_the_original(messages: list[dict[str, str]]) -> None:
    assert render(messages) == original(messages)


def test_a_developer_message_is_a_system_message() -> None:
    assert render([{"role": "developer", "content": "Be short."}, USER]) == original(
        [{"role": "system", "content": "Be short."}, USER]
    )


def test_tools_stand_in_the_system_message_as_json() -> None:
    text = render([{"role": "system", "content": "Be short."}, USER], tools=[LINTER, LINTER])
    system = text.partition("<|im_end|>")[0]
    assert system.startswith("<|im_start|>system\nBe short.\n\n") and text.count("<|im_start|>system") == 1
    lines = system.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in lines] == [LINTER, LINTER]
    assert DEFAULT in render([USER], tools=[LINTER])


@pytest.mark.parametrize("arguments", ['{"code": "x = 1"}', {"code": "x = 1"}])
def test_calls_and_results_are_written_as_the_parser_reads_them(arguments: Any) -> None:
    calls = [
        {"id": i, "type": "function", "function": {"name": "run_linter", "arguments": arguments}}
        for i in "ab"
    ]
    text = render(
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": "clean"},
            {"role": "tool", "tool_call_id": "b", "content": "dirty"},
        ],
        tools=[LINTER],
    )
    turns = [turn.partition("<|im_end|>")[0] for turn in text.split("<|im_start|>")[1:]]
    assert [turn.partition("\n")[0] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    found = [part.partition("</tool_call>")[0] for part in turns[2].split("<tool_call>")[1:]]
    assert [json.loads(call) for call in found] == [
        {"name": "run_linter", "arguments": {"code": "x = 1"}}
    ] * 2
    assert turns[3] == (
        "user\n<tool_response>\nclean\n</tool_response>\n<tool_response>\ndirty\n</tool_response>"
    )


def test_no_generation_prompt_when_none_is_asked_for() -> None:
    assert render([USER], add_generation_prompt=False).endswith("Lint this.<|im_end|>\n")
