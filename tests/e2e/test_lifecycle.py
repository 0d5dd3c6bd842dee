"""What a user does to it: kills a runner, kills the scheduler, starts again, stops."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.conftest import KEY, Hearth, leavings, members, start

EMBEDDING = "all-minilm-l6-v2"
ONLY_SMALL = """
profile = "tiny"
[models.smollm2-135m-instruct]
enabled = false
[models.smollm2-135m-code]
enabled = false
[models.tiny-vision]
enabled = false
[models.tiny-image]
enabled = false
[models.whisper-tiny-en]
enabled = false
[models.yolov8s-world]
enabled = false
"""


def test_a_killed_runner_comes_back_and_says_so_meanwhile(hearth: Hearth, client: openai.OpenAI) -> None:
    model = next(m for m in hearth.status()["models"] if m["id"] == EMBEDDING)
    os.killpg(os.getpgid(model["pid"]), signal.SIGKILL)
    refused: openai.APIStatusError | None = None
    began = time.monotonic()
    while time.monotonic() - began < 120:
        try:
            client.embeddings.create(model=EMBEDDING, input="x")
        except openai.InternalServerError as error:
            refused = error
            time.sleep(0.2)
        else:
            if refused is not None:
                break
            time.sleep(0.05)
    assert refused is not None and refused.status_code == 503
    assert EMBEDDING in refused.message
    assert 1 <= float(refused.response.headers["retry-after"]) <= 120
    status = hearth.wait_ready(120)
    again = next(m for m in status["models"] if m["id"] == EMBEDDING)
    assert again["pid"] != model["pid"] and again["restarts"] == 1


def test_a_runner_killed_in_mid_stream_ends_it_with_an_error(hearth: Hearth, client: openai.OpenAI) -> None:
    code = next(m for m in hearth.status()["models"] if m["category"] == "code")
    stream = client.completions.create(
        model=code["id"],
        prompt="def",
        max_tokens=4000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with pytest.raises(openai.APIError) as caught:
        for number, _ in enumerate(stream):
            if number == 5:
                os.killpg(os.getpgid(code["pid"]), signal.SIGKILL)
    assert code["id"] in caught.value.message
    assert caught.value.code == "runner_lost"
    hearth.wait_ready(240)


def test_logs_and_status_are_for_people(hearth: Hearth) -> None:
    table = hearth.command("status").stdout
    assert EMBEDDING in table and "ready" in table
    assert hearth.command("logs", EMBEDDING, "-n", "5").stdout
    unknown = hearth.command("logs", "all-minilm-l6", check=False)
    assert unknown.returncode == 1 or EMBEDDING in unknown.stdout
    second = hearth.command("serve", "--port", "0", check=False)
    assert second.returncode == 1 and str(hearth.process.pid) in second.stderr


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A configuration that serves the embedding model alone: quick to start."""
    file = tmp_path / "small.toml"
    file.write_text(ONLY_SMALL)
    return file


def test_a_killed_scheduler_is_succeeded_by_one_that_adopts(tmp_path: Path, small: Path) -> None:
    first = start(tmp_path / "state", "--config", str(small))
    second: Hearth | None = None
    groups: set[int] = set()
    try:
        before = first.wait_ready(300)
        groups = first.groups()
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(10)
        # The data path does not need the scheduler.
        with openai.OpenAI(base_url=before["base_url"], api_key=KEY, max_retries=0) as client:
            assert client.embeddings.create(model=EMBEDDING, input="still there").data
        second = start(tmp_path / "state", "--config", str(small))
        after = second.wait_ready(60)
        assert after["scheduler"]["pid"] != before["scheduler"]["pid"]
        assert [m["pid"] for m in after["models"]] == [m["pid"] for m in before["models"]]
        assert [g["pid"] for g in after["gateways"]] == [g["pid"] for g in before["gateways"]]
        groups |= second.groups()
        stopped = second.command("stop")
        assert "Stopped" in stopped.stdout, stopped
        assert second.process.wait(30) == 0
        assert not members(groups)
    finally:
        for running in (first, second):
            if running is not None and running.process.poll() is None:
                running.process.kill()
                running.process.wait(10)
        first.command("stop", "--now", check=False)
    assert not members(groups)


def test_stop_ends_what_a_killed_scheduler_left(tmp_path: Path, small: Path) -> None:
    running = start(tmp_path / "state", "--config", str(small))
    groups: set[int] = set()
    try:
        running.wait_ready(300)
        groups = running.groups()
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(10)
        assert members(groups)
        said = running.command("stop").stdout
        assert EMBEDDING in said
        assert not leavings(running.state_dir)
    finally:
        running.command("stop", "--now", check=False)
    assert not members(groups)
    assert not psutil.pid_exists(running.process.pid) or running.process.poll() is not None


def test_ctrl_c_twice_stops_at_once(tmp_path: Path, small: Path) -> None:
    running = start(tmp_path / "state", "--config", str(small))
    try:
        running.wait_ready(300)
        groups = running.groups()
        running.process.send_signal(signal.SIGINT)
        running.process.send_signal(signal.SIGINT)
        running.process.wait(15)
        assert not members(groups)
    finally:
        running.command("stop", "--now", check=False)
