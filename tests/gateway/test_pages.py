"""What the gateway answers itself: models, health, readiness, metrics, documentation, CORS."""

from __future__ import annotations

import json
import re
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.gateway.endpoints import ENDPOINTS
from engine.gateway.scrape import Page, merged
from engine.metering import keys
from engine.metering.keys import Allowed
from engine.metering.opening import opened
from engine.routes import ExpertBalance
from tests.gateway.dummy import KEY, DummyRunner, House, open_house, route

CHAT = "/v1/chat/completions"


async def test_models_are_listed_with_what_a_client_wants_to_know(house: House, runner: DummyRunner) -> None:
    house.serve(
        route("smol", runner, context_length=2048, capabilities=["tools"], aliases=["gpt-4"], created=17),
        route("org/ears", category="audio", state="starting", reason="loads", eta_s=30),
    )
    models = [model.to_dict() async for model in house.openai.models.list()]
    assert models[0] == {
        "id": "smol",
        "object": "model",
        "created": 17,
        "owned_by": "hearth",
        "aliases": ["gpt-4"],
        "category": "chat",
        "state": "ready",
        "context_length": 2048,
        "capabilities": ["tools"],
        "loading": None,
    }
    assert (models[1]["id"], models[1]["state"], models[1]["category"]) == ("org/ears", "starting", "audio")
    loading = models[1]["loading"]
    assert isinstance(loading, dict) and loading["reason"] == "loads" and 29 < loading["expected_s"] <= 30


async def test_one_model_by_name_alias_or_name_with_a_slash(house: House, runner: DummyRunner) -> None:
    house.serve(route("org/smol", runner, aliases=["gpt-4"]))
    for name in ("org/smol", "gpt-4"):
        assert (await house.openai.models.retrieve(name)).id == "org/smol"
    status, text, _ = await house.get("/v1/models/org/smol")
    assert (status, json.loads(text)["id"]) == (200, "org/smol")
    with pytest.raises(openai.NotFoundError) as caught:
        await house.openai.models.retrieve("org/smoll")
    assert caught.value.code == "model_not_found" and "'org/smol'" in caught.value.message


async def test_a_key_sees_the_models_that_it_may_use(house: House, runner: DummyRunner) -> None:
    house.serve(
        route("smol", runner, aliases=["gpt-4"]),
        route("smol-2", runner),
        route("ears", category="audio"),
        route("eyes", category="vision"),
    )
    async with opened(house.config) as database:
        some, _ = await keys.create(database, allowed=Allowed(models=("smol",)))
        hear, _ = await keys.create(database, allowed=Allowed(categories=("audio", "vision")))
        both, _ = await keys.create(database, allowed=Allowed(models=("smol", "ears"), categories=("chat",)))
    await house.gateway.ring.refresh()

    async def listed(key: str) -> list[str]:
        _, text, _ = await house.get("/v1/models", authorization=f"Bearer {key}")
        return [each["id"] for each in json.loads(text)["data"]]

    assert await listed(some) == ["smol"]
    assert await listed(hear) == ["ears", "eyes"]
    assert await listed(both) == ["smol"], "both restrictions hold"
    assert await listed(KEY) == ["smol", "smol-2", "ears", "eyes"]
    for name in ("smol", "gpt-4"):
        status, text, _ = await house.get(f"/v1/models/{name}", authorization=f"Bearer {some}")
        assert (status, json.loads(text)["id"]) == (200, "smol")
    told = set()
    for name in ("smol-2", "smol-3"):
        status, text, _ = await house.get(f"/v1/models/{name}", authorization=f"Bearer {some}")
        error = json.loads(text)["error"]
        assert (status, error["code"]) == (404, "model_not_found")
        told.add(error["message"].replace(name, ""))
    assert len(told) == 1, "one that is hidden and one that is not there are told alike"


async def test_without_keys_everybody_sees_every_model(
    short: Path, tmp_path: Path, runner: DummyRunner
) -> None:
    async with open_house(tmp_path, route("smol", runner), route("ears"), auth=False) as house:
        async with house.http.get(house.base + "/v1/models") as answer:
            assert [each["id"] for each in (await answer.json())["data"]] == ["smol", "ears"]
        async with house.http.get(house.base + "/v1/models/ears") as answer:
            assert answer.status == 200


async def test_health_readiness_and_metrics_need_no_key(house: House) -> None:
    for path in ("/health", "/ready", "/metrics", "/openapi.json", "/docs"):
        async with house.http.get(house.base + path) as response:
            assert response.status == 200, path
            assert response.headers["x-request-id"]
    async with house.http.head(house.base + "/health") as response:
        assert response.status == 200


async def test_the_documentation_page_needs_no_other_host(house: House) -> None:
    _, page, _ = await house.get("/docs")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) >= 2
    for path in loaded:
        assert path.startswith("/"), path
        async with house.http.get(house.base + path) as response:
            assert response.status == 200, path


async def test_readiness_lists_what_is_not_ready(house: House, runner: DummyRunner) -> None:
    house.serve(route("a", runner), route("b", state="warming", eta_s=40), route("c", state="backoff"))
    status, text, headers = await house.get("/ready")
    error = json.loads(text)["error"]
    assert (status, error["code"], error["ready"]) == (503, "not_ready", False)
    assert [(row["id"], row["state"]) for row in error["models"]] == [("b", "warming"), ("c", "backoff")]
    assert "b (warming), c (backoff)" in error["message"]
    assert headers["retry-after"] == "5"
    house.serve(route("a", runner), route("b", state="warming", eta_s=40))
    assert (await house.get("/ready"))[2]["retry-after"] == "40"
    house.serve()
    status, text, _ = await house.get("/ready")
    assert status == 503 and "no routes" in json.loads(text)["error"]["message"]
    house.serve(route("a", runner), route("b", state="asleep"))
    assert (await house.get("/ready"))[0] == 200


async def test_metrics_tell_of_gateway_models_and_runners(
    house: House, runner: DummyRunner, second: DummyRunner
) -> None:
    house.serve(route("dummy", runner, second), route("late", state="starting", eta_s=9))
    await house.post(CHAT, {"model": "dummy"})
    await house.post(CHAT, {"model": "made-up-by-a-client"})
    await second.stop()
    _, text, headers = await house.get("/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    served = ("endpoint", CHAT), ("model", "dummy")
    assert samples[("hearth_gateway_requests_total", *served, ("status", "200"))] == 1
    assert samples[("hearth_gateway_request_seconds_count", *served)] == 1
    assert samples[("hearth_gateway_first_byte_seconds_count", *served)] == 1
    assert samples[("hearth_gateway_in_flight", ("model", "dummy"))] == 0
    state = ("category", "chat"), ("model", "late")
    assert samples[("hearth_model_state", *state, ("state", "starting"))] == 1
    assert samples[("hearth_model_state", *state, ("state", "ready"))] == 0
    assert samples[("hearth_model_ready_replicas", ("model", "dummy"))] == 2
    where = ("hearth_model", "dummy"), ("hearth_replica", "dummy-0")
    assert samples[("hearth_runner_in_flight", *where)] == 3
    assert samples[("work_done_total", *where, ("kind", "a"))] == 2
    assert samples[("hearth_replica_metrics_up", *where)] == 1
    assert (
        samples[("hearth_replica_metrics_up", ("hearth_model", "dummy"), ("hearth_replica", "dummy-1"))] == 0
    )
    assert "made-up-by-a-client" not in text


async def test_metrics_tell_how_evenly_experts_are_loaded(house: House, runner: DummyRunner) -> None:
    balance = ExpertBalance(over="ranks", overall=0.8, worst=0.5, worst_layer=3)
    house.serve(route("moe", runner, expert_balance=balance), route("dense"))
    _, text, _ = await house.get("/metrics")
    lines = [line for line in text.splitlines() if line.startswith("hearth_model_expert_balancedness")]
    assert lines == [
        'hearth_model_expert_balancedness{layers="all",model="moe",over="ranks"} 0.8',
        'hearth_model_expert_balancedness{layers="worst",model="moe",over="ranks"} 0.5',
    ]


def test_a_family_of_many_replicas_stands_once() -> None:
    text = (
        "# HELP a_seconds Time.\n# TYPE a_seconds histogram\n"
        + "".join(f'a_seconds_bucket{{le="{le}"}} 1.0\n' for le in ("1.0", "+Inf"))
        + "a_seconds_count 1.0\na_seconds_sum 0.5\n"
    )
    got = merged(
        [Page("m", "m-0", text), Page("m", "m-1", text), Page("n", "n-0", "\0 no { metrics")]
    ).decode()
    assert got.count("# TYPE a_seconds histogram") == 1
    assert 'a_seconds_bucket{hearth_model="m",hearth_replica="m-1",le="+Inf"} 1.0' in got
    assert 'hearth_replica_metrics_up{hearth_model="n",hearth_replica="n-0"} 0.0' in got


async def test_openapi_tells_of_every_endpoint(house: House) -> None:
    _, text, _ = await house.get("/openapi.json")
    document = json.loads(text)
    assert set(ENDPOINTS) < set(document["paths"])
    assert {"/v1/models", "/v1/models/{id}", "/health", "/ready", "/metrics"} < set(document["paths"])
    detections = document["paths"]["/v1/detections"]["post"]
    assert set(detections["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    schemas = document["components"]["schemas"]
    assert set(schemas["DetectionRequest"]["properties"]) == {
        "model",
        "image",
        "confidence",
        "iou",
        "max_detections",
        "classes",
    }
    assert set(schemas["DetectedObject"]["required"]) == {"label", "class_id", "confidence", "box"}
    assert set(schemas["Box"]["required"]) == {"x1", "y1", "x2", "y2"}
    for reference in (part.split('"')[0] for part in text.split('"$ref":"#/components/schemas/')[1:]):
        assert reference in schemas


async def test_a_browser_may_call_when_its_origin_is_allowed(tmp_path: Path, runner: DummyRunner) -> None:
    async with open_house(
        tmp_path, route("dummy", runner), gateway={"cors_origins": ["https://app.example"]}
    ) as house:
        ask = {
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        async with house.http.options(house.base + CHAT, headers=ask) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == "https://app.example"
            assert response.headers["x-request-id"]
        # Errors too can be read by the page that asked.
        headers = {"origin": "https://app.example"}
        async with house.http.post(house.base + CHAT, headers=headers) as response:
            assert response.status == 401
            assert response.headers["access-control-allow-origin"] == "https://app.example"
            assert "x-request-id" in response.headers["access-control-expose-headers"].lower()
        async with house.http.post(house.base + CHAT, headers={"origin": "https://evil.example"}) as response:
            assert "access-control-allow-origin" not in response.headers


async def test_the_log_line_names_request_model_and_key_but_no_secret(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hearth.access")
    await house.post(CHAT, {"model": "dummy"}, headers={"x-request-id": "mine-1"})
    await house.get("/bad%0Apath")
    lines = [record.getMessage() for record in caplog.records if record.name == "hearth.access"]
    assert lines[0].startswith(f"200 POST {CHAT} model=dummy ")
    assert "id=mine-1" in lines[0] and "key=key_" in lines[0]
    assert "hearth-test-key" not in caplog.text
    assert "\\n" in lines[1] and "\n" not in lines[1]
