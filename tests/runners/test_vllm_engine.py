"""vLLM's own server as a runner, alone on its socket: what it answers, and that nothing outlives it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image, ImageDraw

from models.catalog import load_catalog
from tests.runners.conftest import Started, StartRunner

pytestmark = pytest.mark.engines
READY_S = 300.0
LINTER = {
    "type": "function",
    "function": {
        "name": "run_linter",
        "description": "Run a Python linter on source code and return its findings.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


def start(start_runner: StartRunner, weights: Callable[[str], Path], name: str) -> Started:
    entry = load_catalog().find(name)
    return start_runner(
        "engine.runners.vllm_server",
        model=entry.id,
        aliases=entry.aliases,
        category=entry.category,
        engine=entry.engine,
        model_dir=weights(name),
        context_length=1024,
        options=entry.options,
    )


def group_of(leader: int) -> list[int]:
    """Processes of the leader's group that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


async def gone(leader: int, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while group_of(leader):
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.1)
    return True


async def test_the_chat_model_answers_and_nothing_outlives_a_kill(
    start_runner: StartRunner, weights: Callable[[str], Path]
) -> None:
    runner = start(start_runner, weights, "tiny-chat")
    await runner.ready(READY_S)
    assert stat.S_IMODE(runner.socket.stat().st_mode) == 0o600

    async def chat(text: str, **more: Any) -> dict[str, Any]:
        body = {
            "model": "tiny-chat",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            **more,
        }
        status, answer, _ = await runner.post("/v1/chat/completions", {"max_tokens": 64, **body})
        assert status == 200, answer
        return dict(answer["choices"][0])

    answer = await chat("What is the capital of France?")
    assert "Paris" in answer["message"]["content"] and answer["finish_reason"] == "stop"

    # The arguments keep to the tool's schema, though the model knows nothing of tools.
    for choice in ("required", {"type": "function", "function": {"name": "run_linter"}}):
        answer = await chat("Lint this code: `import os`", tools=[LINTER], tool_choice=choice)
        call = answer["message"]["tool_calls"][0]["function"]
        assert call["name"] == "run_linter" and list(json.loads(call["arguments"])) == ["code"]
    answer = await chat("Hello!", tools=[LINTER], tool_choice="auto")
    assert answer["message"]["content"] or answer["message"]["tool_calls"]

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = await chat("Describe a person as JSON.", response_format=wanted)
    assert set(json.loads(answer["message"]["content"])) == {"name", "age"}

    # The first request for logprobs must not wait for a compiler.
    began = time.monotonic()
    answer = await chat("Hi", logprobs=True, top_logprobs=2, max_tokens=2)
    assert len(answer["logprobs"]["content"][0]["top_logprobs"]) == 2 and time.monotonic() - began < 10

    messages = [{"role": "user", "content": "word " * 2000}]
    status, error, _ = await runner.post("/v1/chat/completions", {"model": "tiny-chat", "messages": messages})
    assert status == 400 and error["error"]["code"] == "context_length_exceeded"
    status, error, _ = await runner.post("/v1/chat/completions", {"model": "none", "messages": messages[:1]})
    assert status == 404 and error["error"]["code"] == "model_not_found"

    leader = runner.process.pid
    assert len(group_of(leader)) >= 3
    os.kill(leader, signal.SIGKILL)
    runner.process.wait(10)
    assert await gone(leader, 10), group_of(leader)


def picture() -> bytes:
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).ellipse((60, 60, 180, 180), fill=(220, 30, 30))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


async def test_the_vision_model_sees_and_fetches_nothing_and_a_stop_is_clean(
    start_runner: StartRunner, weights: Callable[[str], Path]
) -> None:
    runner = start(start_runner, weights, "tiny-vision")
    await runner.ready(READY_S)

    async def look(url: str, **more: Any) -> tuple[int, Any]:
        content = [
            {"type": "text", "text": "What shape and colour is in this image?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        body = {
            "model": "tiny-vision",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            **more,
        }
        status, answer, _ = await runner.post("/v1/chat/completions", body)
        return status, answer

    def as_url(data: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(data).decode()

    status, answer = await look(as_url(picture()))
    text = answer["choices"][0]["message"]["content"]
    assert status == 200 and "red" in text and "circle" in text
    status, answer = await look(as_url(picture()), response_format={"type": "json_object"}, max_tokens=100)
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)

    for url, code in (
        ("http://127.0.0.1:1/x.png", "invalid_image_url"),
        ("file:///etc/hostname", "invalid_image_url"),
        (as_url(b""), "invalid_image"),
        (as_url(picture()[:400]), "invalid_image"),
        ("data:image/png;base64,@@@@", "invalid_image"),
    ):
        status, answer = await look(url)
        assert (status, answer["error"]["code"]) == (400, code), (url, answer)

    leader = runner.process.pid
    os.kill(leader, signal.SIGTERM)
    assert await asyncio.to_thread(runner.process.wait, 40) == 0, runner.log.read_text()[-2000:]
    assert await gone(leader, 5), group_of(leader)
    assert not runner.socket.exists()
