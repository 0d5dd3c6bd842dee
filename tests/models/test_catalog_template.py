"""DeepSeek R1's chat template: its own format without tools, and tools as vLLM's parser reads them."""

# ruff: noqa: RUF001 - DeepSeek's tokens have fullwidth bars.
from __future__ import annotations

import json
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.catalog import CATALOG_DIR

BOS = "<｜begin▁of▁sentence｜>"
LINTER = {"type": "function", "function": {"name": "run_linter", "parameters": {"type": "object"}}}
CALLS = [
    {"function": {"name": "run_linter", "arguments": {"code": "x=1"}}},
    {"function": {"name": "now", "arguments": "{}"}},
]
USER = {"role": "user", "content": "Lint this."}
ASSISTANT, THINK = "<｜Assistant｜>", "<think>\n"


def render(messages: list[dict[str, Any]], **more: Any) -> str:
    # As transformers makes it.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((CATALOG_DIR / "templates" / "deepseek-r1.jinja").read_text())
    return template.render(messages=messages, bos_token=BOS, **{"add_generation_prompt": True, **more})


def test_a_conversation_is_written_without_earlier_thoughts() -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        USER,
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nDone."},
        {"role": "user", "content": "Again."},
    ]
    assert render(messages) == (
        f"{BOS}Be short.<｜User｜>Lint this.{ASSISTANT}\n\nDone.<｜end▁of▁sentence｜>"
        f"<｜User｜>Again.{ASSISTANT}{THINK}"
    )


def test_tools_are_shown_after_the_system_message() -> None:
    text = render([{"role": "system", "content": "Be short."}, USER], tools=[LINTER])
    system, _, rest = text.partition("<｜User｜>")
    assert system.startswith(f"{BOS}Be short.\n\nYou may call functions")
    assert '{"name": "run_linter", "parameters": {"type": "object"}}' in system
    assert rest == f"Lint this.{ASSISTANT}{THINK}"
    assert render([USER], tools=[LINTER]).startswith(f"{BOS}You may call functions")
    assert "call functions" not in render([USER])


def test_calls_and_their_results_are_one_turn_of_the_assistant() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS},
        {"role": "tool", "content": "ok"},
        {"role": "tool", "content": "noon"},
    ]
    calls = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>run_linter\n"
        '```json\n{"code": "x=1"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    outputs = (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>ok<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    asked = f"{BOS}<｜User｜>Lint this.{ASSISTANT}Let me see.{calls}<｜end▁of▁sentence｜>{outputs}"
    assert render(messages) == asked + THINK
    answer = {"role": "assistant", "content": "Clean."}
    assert render([*messages, answer], add_generation_prompt=False) == f"{asked}Clean.<｜end▁of▁sentence｜>"
