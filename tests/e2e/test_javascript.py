"""The real JavaScript client: streaming and embeddings."""

from __future__ import annotations

import json

import pytest

from tests.e2e import node
from tests.e2e.conftest import KEY


def test_streaming(base_url: str) -> None:
    printed = node.run(
        "stream.mjs",
        "smollm2-135m-instruct",
        "What is the capital of France?",
        base_url=base_url,
        api_key=KEY,
    )
    text, summary = printed.rstrip().rsplit("\n", 1)
    found = json.loads(summary)
    assert "Paris" in text
    assert found["deltas"] > 3 and found["finish"] == "stop" and found["usage"]["completion_tokens"] > 3


def test_embeddings_in_base64_are_whole(base_url: str) -> None:
    found = json.loads(node.run("embeddings.mjs", "all-minilm-l6-v2", base_url=base_url, api_key=KEY))
    assert found["length"] == 384
    assert found["norm"] == pytest.approx(1, abs=1e-4)
    assert found["difference"] < 1e-6
