"""Every failure is OpenAI's envelope: right status, type, param, code; through the whole server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import KEY

CHAT = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def http(base_url: str) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with httpx.Client(base_url=base_url, headers=headers, timeout=60, trust_env=False) as made:
        yield made


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["message"] and "Traceback" not in error["message"]
    return error


def test_unknown_model_names_the_nearest(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="smollm2-135m-instrukt", messages=[])
    assert caught.value.code == "model_not_found" and CHAT in caught.value.message


def test_bad_key(base_url: str) -> None:
    wrong = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", b"{"),
        ("/chat/completions", b'{"model": "\xff"}'),
        ("/chat/completions", b"[]"),
        ("/chat/completions", b"{}"),
        ("/chat/completions", b'{"model": 3}'),
        ("/chat/completions", json.dumps({"model": CHAT}).encode()),
        ("/chat/completions", json.dumps({"model": CHAT, "messages": "hi"}).encode()),
        ("/chat/completions", json.dumps({"model": CHAT, "messages": [], "temperature": "hot"}).encode()),
        ("/embeddings", json.dumps({"model": "all-minilm-l6-v2"}).encode()),
        ("/images/generations", json.dumps({"model": "tiny-image"}).encode()),
        ("/detections", json.dumps({"model": "yolov8s-world"}).encode()),
        ("/embeddings", json.dumps({"model": CHAT, "input": "x"}).encode()),
        ("/chat/completions", json.dumps({"model": "tiny-image", "messages": []}).encode()),
    ],
)
def test_bad_bodies(http: httpx.Client, path: str, body: bytes) -> None:
    assert error_of(http.post(path, content=body), 400)["type"] == "invalid_request_error"


def test_missing_field_is_named(http: httpx.Client) -> None:
    assert error_of(http.post("/chat/completions", json={"model": CHAT}), 400)["param"] == "messages"
    assert error_of(http.post("/embeddings", json={"model": "all-minilm-l6-v2"}), 400)["param"] == "input"
    assert error_of(http.post("/images/generations", json={"model": "tiny-image"}), 400)["param"] == "prompt"


def test_unknown_path_and_method(http: httpx.Client) -> None:
    error_of(http.get("/nothing"), 404)
    error_of(http.get("/chat/completions"), 405)


def test_too_large(http: httpx.Client) -> None:
    error_of(http.post("/chat/completions", content=b" " * (64 * 1024 * 1024 + 1)), 413)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,AAAA", "file:///etc/passwd", "ftp://example.com/a.png"]
)
def test_bad_pictures_in_chat(http: httpx.Client, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"model": "tiny-vision", "messages": [{"role": "user", "content": content}]}
    assert error_of(http.post("/chat/completions", json=body), 400)["param"].endswith("image_url.url")


def test_models(client: openai.OpenAI) -> None:
    rows = {model.id: model.model_dump() for model in client.models.list()}
    assert {row["category"] for row in rows.values()} == {
        "chat",
        "code",
        "vision",
        "image",
        "audio",
        "embedding",
        "detection",
    }
    one = client.models.retrieve(CHAT).model_dump()
    assert one["state"] == "ready" and one["context_length"] == 8192 and "tools" in one["capabilities"]


def test_health_ready_metrics_and_openapi(base_url: str) -> None:
    root = base_url.removesuffix("/v1")
    with httpx.Client(base_url=root, trust_env=False) as bare:
        assert bare.get("/health").status_code == 200
        assert bare.get("/ready").status_code == 200
        metrics = bare.get("/metrics").text
        paths = bare.get("/openapi.json").json()["paths"]
    for name in ("hearth_gateway_requests_total", "hearth_runner_requests_total", "vllm:"):
        assert name in metrics
    assert "/v1/detections" in paths and "/v1/chat/completions" in paths


def test_a_long_prompt_passes_whole(http: httpx.Client) -> None:
    """5 MB of body reach the runner, whose answer is that it is too long for the model."""
    body = {"model": CHAT, "messages": [{"role": "user", "content": "a b " * 1_250_000}]}
    assert error_of(http.post("/chat/completions", json=body), 400)["code"] == "context_length_exceeded"
