"""What only the scheduler may ask of a runner: no client reaches it through the gateway."""

from __future__ import annotations

import pytest
from yarl import URL

from tests.gateway.dummy import KEY, DummyRunner, House

INNER = [
    "/sleep",
    "/sleep?level=1",
    "/wake_up",
    "/is_sleeping",
    "/collective_rpc",
    "/release_kv_cache_memory",
]
DISGUISED = [
    "/v1/sleep",
    "/v1/../sleep",
    "/v1/chat/completions/../../../sleep",
    "//sleep",
    "/%73leep",
    "/sleep/",
]


@pytest.mark.parametrize("path", [*INNER, *DISGUISED])
async def test_no_path_of_a_runners_sleep_is_forwarded(house: House, runner: DummyRunner, path: str) -> None:
    for method in ("GET", "POST"):
        body = {"json": {"model": "dummy"}} if method == "POST" else {}
        headers = {"authorization": f"Bearer {KEY}"}
        url = URL(house.base + path, encoded=True)  # as it stands: the client must not tidy it
        async with house.http.request(method, url, headers=headers, **body) as answer:
            assert answer.status in (404, 405), await answer.text()
            assert (await answer.json())["error"]["code"]
    assert runner.seen == []
