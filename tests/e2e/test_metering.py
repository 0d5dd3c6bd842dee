"""What real engines answer is charged, counted and bounded, as its caller and the operator see it."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Hearth

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"
PARIS: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def token(hearth: Hearth) -> str:
    """A key of a tenant whose plan has prices, included requests, a budget and a largest context."""
    terms = ["--price", "2", "--category", "embedding=1", "--included", "1", "--budget", "9"]
    hearth.command("plans", "create", "metered", "--currency", "EUR", *terms, "--max-context", "1500")
    hearth.command("tenants", "create", "acme", "--plan", "metered")
    return hearth.command("keys", "create", "app", "--tenant", "acme").stdout.strip()


def test_a_bill_follows_the_requests(hearth: Hearth, base_url: str, token: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key=token, max_retries=0) as client:
        deadline = time.monotonic() + 5
        charges = []
        while len(charges) < 3:
            try:
                told = client.chat.completions.with_raw_response.create(
                    model=CHAT, messages=PARIS, temperature=0, max_tokens=8
                )
            except openai.AuthenticationError:
                # A new key is known to every worker within a second.
                assert time.monotonic() < deadline
                time.sleep(0.1)
                continue
            charges.append((told.headers["x-hearth-charge"], told.headers["x-hearth-budget-remaining"]))
        assert charges == [("0", "9"), ("2", "7"), ("2", "5")]
        vectors = client.embeddings.with_raw_response.create(model=EMBED, input="a cat")
        assert vectors.headers["x-hearth-charge"] == "1"
        with client.chat.completions.create(
            model=CHAT, messages=PARIS, max_tokens=8, stream=True, stream_options={"include_usage": True}
        ) as stream:
            assert stream.response.headers["x-hearth-charge"] == "2"
            assert list(stream)[-1].usage is not None
        # A long prompt costs what a short one does.
        long: list[Any] = [{"role": "user", "content": "word " * 1200}]
        told = client.chat.completions.with_raw_response.create(model=CHAT, messages=long, max_tokens=8)
        assert told.headers["x-hearth-charge"] == "2"
        assert told.headers["x-hearth-budget-remaining"] == "0"
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=CHAT, messages=PARIS)
        assert caught.value.code == "insufficient_quota"
    usage = httpx.get(f"{base_url}/usage", headers={"authorization": f"Bearer {token}"}).json()
    assert usage["total"] == {"requests": 6, "charge": 9, "unit": "EUR"}
    assert {part["model"]: part["charge"] for part in usage["by_model"]} == {CHAT: 8, EMBED: 1}


def test_the_largest_context_is_counted_with_the_models_own_tokenizer(base_url: str, token: str) -> None:
    for words, output, refused in ((1200, 8, False), (1600, 8, True), (1200, 400, True)):
        body = {
            "model": CHAT,
            "messages": [{"role": "user", "content": "word " * words}],
            "max_tokens": output,
        }
        told = httpx.post(
            f"{base_url}/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {token}"},
            timeout=60,
        )
        code = told.json()["error"]["code"]
        # What is within the context gets as far as the budget, which is used up.
        assert code == ("context_length_exceeded" if refused else "insufficient_quota")


def test_the_operator_sees_the_same_and_the_books_agree(hearth: Hearth) -> None:
    told = json.loads(hearth.command("usage", "--tenant", "acme", "--json").stdout)
    assert told["total"]["requests"] == 6
    assert told["total"]["charge"] == 9
    assert "EUR" in hearth.command("usage", "--tenant", "acme", "--by", "model", "--chart").stdout
    verified = hearth.command("usage", "verify", check=False)
    assert verified.returncode == 0, verified.stdout
