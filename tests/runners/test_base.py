"""The base with a dummy engine, as a real process on a real Unix socket."""

from __future__ import annotations

import asyncio
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from tests.runners.conftest import Started, StartRunner

DUMMY = "tests.runners.dummy"


def _await_file(path: Path, deadline_s: float) -> None:
    until = time.monotonic() + deadline_s
    while not path.exists():
        assert time.monotonic() < until, f"{path} never appeared"
        time.sleep(0.01)


async def appears(path: Path, deadline_s: float = 10) -> None:
    await asyncio.to_thread(_await_file, path, deadline_s)


async def left(started: Started, deadline_s: float = 15) -> int:
    return await asyncio.to_thread(started.process.wait, deadline_s)


async def test_health_is_503_until_loaded_and_the_socket_is_private(
    start_runner: StartRunner, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    started = start_runner(DUMMY, options={"wait_for": str(gate)})
    await appears(started.socket)
    assert stat.S_IMODE(started.socket.stat().st_mode) == 0o600
    until = time.monotonic() + 10
    while True:
        try:
            assert await started.health() == 503
            break
        except aiohttp.ClientError:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
    status, body, headers = await started.post("/v1/length", {"model": "dummy", "text": "a"})
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "model_loading", "2")
    gate.touch()
    await started.ready()
    status, body, _ = await started.post("/v1/length", {"model": "dummy", "text": "abc"})
    assert (status, body["length"], body["threads"]) == (200, 3, "1")


async def test_a_failed_load_says_why_and_exits_with_1(start_runner: StartRunner) -> None:
    started = start_runner(DUMMY, options={"broken": True})
    assert await left(started) == 1
    assert (
        "dummy cannot be loaded: weights.bin is missing; run the preparation again" in started.log.read_text()
    )
    assert not started.socket.exists()


async def test_errors_are_envelopes_and_hide_the_stack(start_runner: StartRunner) -> None:
    started = start_runner(DUMMY, aliases=["other"])
    await started.ready()

    async def error(body: object, path: str = "/v1/length") -> tuple[int, str | None, str | None]:
        status, answer, headers = await started.post(path, body, headers={"x-request-id": "abc"})
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert headers.get("x-request-id") == ("abc" if path == "/v1/length" else None)
        return status, answer["error"]["param"], answer["error"]["code"]

    assert await error(b"{") == (400, None, "invalid_json")
    assert await error(b"\xff\xfe") == (400, None, "invalid_json")
    assert await error(b"") == (400, None, "invalid_json")
    assert await error(b"[" * 200_000) == (400, None, "invalid_json")
    assert await error([1]) == (400, None, "invalid_json")
    assert await error({"text": "a"}) == (400, "model", "missing_field")
    assert await error({"model": "dumy", "text": "a"}) == (404, "model", "model_not_found")
    assert await error({"model": "other"}) == (400, "text", "missing_field")
    assert await error({}, "/v1/nothing") == (404, None, "unknown_path")

    status, answer, headers = await started.post("/v1/length", {"model": "dummy", "text": "cross"})
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert headers["x-request-id"] in answer["error"]["message"]
    assert "secret" not in str(answer) and "Traceback" not in str(answer)
    assert "RuntimeError: secret detail" in started.log.read_text()


async def test_waiting_requests_run_together(start_runner: StartRunner) -> None:
    started = start_runner(DUMMY, max_batch=3, max_wait_ms=5000)
    await started.ready()
    texts = ["a", "bb", "ccc"]
    answers = await asyncio.gather(
        *(started.post("/v1/length", {"model": "dummy", "text": text}) for text in texts)
    )
    assert [(body["length"], body["together"]) for _, body, _ in answers] == [(1, 3), (2, 3), (3, 3)]
    async with started.session() as session, session.get("/metrics") as answer:
        text = await answer.text()
    assert 'hearth_runner_requests_total{status="200"} 3.0' in text
    assert "hearth_runner_batch_size_sum 3.0" in text
    assert "hearth_runner_batch_size_count 1.0" in text
    assert "hearth_runner_queue_waiting 0.0" in text
    assert "hearth_runner_in_flight 0.0" in text
    for name in ("request_seconds_count", "queue_wait_seconds_count"):
        assert f"hearth_runner_{name} 3.0" in text


async def test_a_stream_ends_in_done_or_in_an_error_event(start_runner: StartRunner) -> None:
    started = start_runner(DUMMY)
    await started.ready()

    async def events(text: str) -> tuple[int, list[bytes]]:
        body = {"model": "dummy", "text": text, "stream": True}
        async with started.session() as session, session.post("/v1/length", json=body) as answer:
            assert answer.content_type == "text/event-stream"
            return answer.status, (await answer.read()).split(b"\n\n")

    assert await events("ab") == (200, [b'data: {"delta":"a"}', b'data: {"delta":"b"}', b"data: [DONE]", b""])
    status, seen = await events("ab!")
    assert status == 200
    assert seen[:3] == [b'data: {"delta":"a"}', b'data: {"delta":"b"}', b'data: {"delta":"!"}']
    assert seen[3].startswith(b'data: {"error": {"message": ') and b"secret" not in seen[3]
    assert seen[4:] == [b""]
    # Before the first event an error still has its own status.
    status, body, _ = await started.post("/v1/length", {"model": "dummy", "text": "cross", "stream": True})
    assert (status, body["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_work_stops_when_its_client_goes(
    start_runner: StartRunner, tmp_path: Path, stream: bool
) -> None:
    started = start_runner(DUMMY)
    await started.ready()
    mark = str(tmp_path / "work")
    body = {"model": "dummy", "text": "slow", "mark": mark, "stream": stream}
    async with started.session() as session:
        request = asyncio.create_task(session.post("/v1/length", json=body))
        await appears(Path(mark + ".started"))
        if stream:
            (await request).close()
        else:
            request.cancel()
        await appears(Path(mark + ".cancelled"))
    # The worker is free again at once.
    status, answer, _ = await started.post("/v1/length", {"model": "dummy", "text": "next"})
    assert (status, answer["length"]) == (200, 4)
    async with started.session() as session, session.get("/metrics") as metrics:
        assert 'hearth_runner_requests_total{status="499"} 1.0' in await metrics.text()


async def test_a_full_queue_is_429_with_retry_after(start_runner: StartRunner, tmp_path: Path) -> None:
    started = start_runner(DUMMY, max_queue=1, max_batch=1)
    await started.ready()
    mark = str(tmp_path / "work")
    slow = {"model": "dummy", "text": "slow", "mark": mark, "seconds": 1}
    first = asyncio.create_task(started.post("/v1/length", slow))
    await appears(Path(mark + ".started"))
    answers = await asyncio.gather(
        *(started.post("/v1/length", {"model": "dummy", "text": "a"}) for _ in range(3)), first
    )
    assert sorted(status for status, _, _ in answers) == [200, 200, 429, 429]
    _, body, headers = next(answer for answer in answers if answer[0] == 429)
    assert body["error"]["code"] == "queue_full" and body["error"]["type"] == "rate_limit_error"
    assert int(headers["retry-after"]) >= 1


async def test_sigterm_lets_running_work_finish_and_exits_with_0(
    start_runner: StartRunner, tmp_path: Path
) -> None:
    started = start_runner(DUMMY)
    await started.ready()
    mark = str(tmp_path / "work")
    body = {"model": "dummy", "text": "slow", "mark": mark, "seconds": 0.5}
    request = asyncio.create_task(started.post("/v1/length", body))
    await appears(Path(mark + ".started"))
    started.process.send_signal(signal.SIGTERM)
    status, answer, _ = await request
    assert (status, answer["length"]) == (200, 4)
    assert await left(started) == 0
    assert not started.socket.exists()


async def test_sigterm_does_not_wait_beyond_the_drain(start_runner: StartRunner, tmp_path: Path) -> None:
    started = start_runner(DUMMY, drain_s=0.2)
    await started.ready()
    mark = str(tmp_path / "work")
    body = {"model": "dummy", "text": "slow", "mark": mark, "seconds": 60}
    request = asyncio.create_task(started.post("/v1/length", body))
    await appears(Path(mark + ".started"))
    before = time.monotonic()
    started.process.send_signal(signal.SIGTERM)
    assert await left(started) == 0
    assert time.monotonic() - before < 5
    await asyncio.gather(request, return_exceptions=True)
    await appears(Path(mark + ".cancelled"), 0)


async def test_sigterm_while_loading_exits_with_0(start_runner: StartRunner, tmp_path: Path) -> None:
    started = start_runner(DUMMY, options={"wait_for": str(tmp_path / "never")})
    await appears(started.socket)
    started.process.send_signal(signal.SIGTERM)
    assert await left(started) == 0


async def test_a_stale_socket_is_replaced(start_runner: StartRunner, tmp_path: Path) -> None:
    first = start_runner(DUMMY)
    await first.ready()
    first.process.kill()
    await left(first)
    assert first.socket.exists()
    second = start_runner(DUMMY, socket=first.socket)
    second.socket = first.socket
    await second.ready()


def test_a_wrong_specification_is_named(start_runner: StartRunner, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text('{"model": "x"}')
    ran = subprocess.run(
        [sys.executable, "-m", DUMMY, "--spec", str(file)], capture_output=True, text=True, timeout=30
    )
    assert ran.returncode == 2
    assert "is no runner specification" in ran.stderr and "Traceback" not in ran.stderr
