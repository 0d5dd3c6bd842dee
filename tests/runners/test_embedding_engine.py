"""The embedding runner with the real all-MiniLM-L6-v2."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runners.conftest import StartRunner

pytestmark = pytest.mark.engines
MODEL = "all-minilm-l6-v2"


async def test_the_real_model_answers(start_runner: StartRunner, weights: Callable[[str], Path]) -> None:
    started = start_runner(
        "engine.runners.embedding",
        model=MODEL,
        model_dir=weights(MODEL),
        max_batch=8,
        can_sleep=True,
        options={"batch_tokens": 512},
    )
    await started.ready(120)

    async def ask(given: Any, **over: Any) -> dict[str, Any]:
        status, body, _ = await started.post("/v1/embeddings", {"model": MODEL, "input": given, **over})
        assert status == 200, body
        return dict(body)

    async def vectors(given: Any, **over: Any) -> np.ndarray:
        return np.array([row["embedding"] for row in (await ask(given, **over))["data"]])

    cat, kitten, crash = await vectors(["a cat", "a kitten", "the stock market crashed"])
    assert cat.shape == (384,)
    assert np.allclose([np.linalg.norm(one) for one in (cat, kitten, crash)], 1, atol=1e-5)
    assert cat @ kitten > cat @ crash + 0.3

    # Padding and company change nothing: each text alone, and all of them at once from many clients.
    texts = [" ".join(["word", "cat", "stone"][: 1 + n % 3] * (1 + n % 17)) for n in range(40)]
    alone = np.concatenate([await vectors(text) for text in texts])
    together = await vectors(texts)
    crowd = np.concatenate(await asyncio.gather(*(vectors(text) for text in texts)))
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(crowd - alone).max() < 1e-5

    # Token arrays of the model's own tokenizer, with its special tokens or without, are the text.
    assert (await ask("hello world"))["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    for tokens in ([7592, 2088], [101, 7592, 2088, 102]):
        assert np.abs(await vectors(tokens) - await vectors("hello world")).max() < 1e-6
    packed = base64.b64decode((await ask("cat", encoding_format="base64"))["data"][0]["embedding"])
    assert np.abs(np.frombuffer(packed, "<f4") - (await vectors("cat"))[0]).max() < 1e-7
    short, full = await vectors("cat", dimensions=64), await vectors("cat")
    assert np.allclose(short[0], full[0][:64] / np.linalg.norm(full[0][:64]), atol=1e-6)

    # 256 tokens are taken, special ones included; one more is refused and never cut.
    assert (await ask("word " * 254))["usage"]["prompt_tokens"] == 256
    status, body, _ = await started.post("/v1/embeddings", {"model": MODEL, "input": "word " * 255})
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")

    for _ in range(2):
        await started.sleeps_and_wakes(weights(MODEL))
        assert (await vectors(texts) == together).all()

    # Sleeps and wakes in the middle of the load: each request is answered rightly or told to wait.
    async def persistent(text: str) -> np.ndarray:
        while True:
            status, body, _ = await started.post("/v1/embeddings", {"model": MODEL, "input": text})
            if status == 200:
                return np.array(body["data"][0]["embedding"])
            assert (status, body["error"]["code"]) == (503, "model_asleep"), body
            status, _, _ = await started.post("/wake_up", b"")
            assert status == 200

    async def disturb() -> list[int]:
        seen = []
        while seen.count(200) < 10:
            seen.append((await started.post("/sleep", b""))[0])
            await asyncio.sleep(0.01)
        return seen

    disturbed = asyncio.create_task(disturb())
    for _ in range(3):
        for batch in range(0, 40, 4):
            rows = await asyncio.gather(*(persistent(text) for text in texts[batch : batch + 4]))
            assert np.abs(np.array(rows) - alone[batch : batch + 4]).max() < 1e-5
    assert set(await disturbed) <= {200, 409}
    assert np.abs(await persistent("a cat") - cat).max() < 1e-5

    started.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(started.process.wait, 15) == 0
