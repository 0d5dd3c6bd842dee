"""The tiny mixture of experts: over two ranks with its experts shared out it says what one rank says.

One rank is a runner alone on its socket; the two are `hearth serve --profile tiny-moe`, as a user starts it.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from engine.runners import scratch
from engine.runners.spec import RunnerSpec
from models.catalog import load_catalog, load_profile
from models.prepare import prepare
from models.tiny.moe.questions import Question, sample_question
from tests.e2e.conftest import KEY, ROOT, Hearth, environment, leavings, members, start

MODEL = "tiny-moe"
READY_S = 300.0
CONCURRENT = 16


@dataclass(frozen=True)
class Answer:
    """What was said, as text and as tokens, and by what."""

    text: str
    tokens: list[int]
    engine: str


def prompts(count: int = 64) -> list[Question]:
    """Different questions that training never drew."""
    rng = random.Random("served by one rank and by two")
    found: dict[str, Question] = {}
    while len(found) < count:
        question = sample_question(rng, held_out=True)
        found.setdefault(question.text, question)
    return list(found.values())


def ask(client: openai.OpenAI, text: str) -> Answer:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=48,
        extra_body={"return_token_ids": True},
    )
    choice = answer.choices[0]
    assert choice.model_extra is not None
    return Answer(
        choice.message.content or "", choice.model_extra["token_ids"], answer.system_fingerprint or ""
    )


def ask_all(client: openai.OpenAI) -> list[Answer]:
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(lambda question: ask(client, question.text), prompts()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Answer]]:
    """The answers of one rank; its runner is stopped by SIGTERM before the other starts."""
    folder = tmp_path_factory.mktemp("one-rank")
    entry = load_catalog().find(MODEL)
    weights = Path(environment()["HEARTH_WEIGHTS__DIR"])
    with tempfile.TemporaryDirectory(prefix="hm") as short:
        spec = RunnerSpec(
            model=entry.id,
            category=entry.category,
            engine=entry.engine,
            model_dir=prepare(entry, weights, offline=True, report=lambda _: None),
            socket=Path(short) / "one.sock",
            context_length=entry.context_length,
            max_batch=load_profile(MODEL).models[0].max_batch,
            drain_s=5,
            options=entry.options,
        )
        (folder / "spec.json").write_text(spec.model_dump_json())
        words = [sys.executable, "-m", "engine.runners.vllm_server", "--spec", str(folder / "spec.json")]
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield _answers_of(spec.socket, process, folder / "log.txt")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
            scratch.clear_shared(Path(short))


def _answers_of(socket: Path, process: subprocess.Popen[bytes], log: Path) -> list[Answer]:
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport) as web:
        until = time.monotonic() + READY_S
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            try:
                if web.get("http://runner/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        client = openai.OpenAI(
            base_url="http://runner/v1", api_key="none", http_client=web, max_retries=0, timeout=120
        )
        answers = ask_all(client)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 0, log.read_text()[-4000:]
    assert not _living({process.pid}, within_s=5)
    assert not socket.exists() and not scratch.folder_of(socket).exists()
    assert not list(scratch.SHARED_MEMORY.glob(f"*{scratch.shm_prefix(socket)}*"))
    return answers


def _living(groups: set[int], within_s: float) -> list[psutil.Process]:
    """What is left of these process groups after so long; returns early once nothing is."""
    until = time.monotonic() + within_s
    while (left := members(groups)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


@pytest.fixture(scope="module")
def moe(alone: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hearth]:
    """`hearth serve --profile tiny-moe`, ended by Ctrl-C; then nothing of it may be left."""
    running = start(tmp_path_factory.mktemp("moe"), "--profile", MODEL)
    groups: set[int] = set()
    try:
        running.wait_ready(READY_S)
        groups = running.groups()
        yield running
        groups |= running.groups()
    finally:
        running.process.send_signal(signal.SIGINT)
        try:
            running.process.wait(90)
        except subprocess.TimeoutExpired:
            running.command("stop", "--now", check=False)
            running.process.kill()
            raise
    assert running.process.returncode == 0, running.output.read_text()[-3000:]
    assert not members(groups), "processes outlived Ctrl-C"
    assert not leavings(running.state_dir)


@pytest.fixture(scope="module")
def moe_client(moe: Hearth) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=moe.base_url, api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def runner_of(hearth: Hearth) -> int:
    """The process that leads the model's runner."""
    return int(hearth.status()["models"][0]["pid"])


def ranks_of(hearth: Hearth) -> list[psutil.Process]:
    """The engine's worker processes, by rank."""
    titles = {process: " ".join(process.cmdline()) for process in members({runner_of(hearth)})}
    return sorted(
        (process for process, title in titles.items() if "Worker" in title), key=lambda p: titles[p]
    )


def test_two_ranks_say_token_for_token_what_one_says(alone: list[Answer], moe_client: openai.OpenAI) -> None:
    together = ask_all(moe_client)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({tuple(answer.tokens) for answer in alone}) > 48
    # vLLM says in each answer how it is laid out.
    assert all("-tp2-ep" in answer.engine for answer in together)
    assert not any("-tp" in answer.engine or "-ep" in answer.engine for answer in alone)


def test_the_answers_are_right(alone: list[Answer]) -> None:
    right = [answer.text == question.answer for answer, question in zip(alone, prompts(), strict=True)]
    assert sum(right) >= 58, [q.text for q, fine in zip(prompts(), right, strict=True) if not fine]


def test_each_rank_has_half_of_the_experts_and_none_listens_beyond_this_machine(moe: Hearth) -> None:
    assert [process.cmdline()[0][-7:] for process in ranks_of(moe)] == ["TP0_EP0", "TP1_EP1"]
    log = moe.command("logs", MODEL, "-n", "1000").stdout
    assert re.search(
        r"EP Rank 0/2\] Expert parallelism is enabled.*Local/global number of experts: 8/16", log
    )
    for process in members({runner_of(moe)}):
        listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1"}, (process.cmdline(), listening)


def test_how_evenly_the_experts_are_loaded_is_told(moe: Hearth, moe_client: openai.OpenAI) -> None:
    ask(moe_client, "Hello!")
    told = moe.status()["models"][0]["expert_balance"]
    assert told["over"] == "ranks" and 0.5 <= told["worst"] <= told["overall"] <= 1
    assert "balance of ranks" in " ".join(moe.command("status").stdout.split())
    metrics = httpx.get(f"{moe.base_url.removesuffix('/v1')}/metrics").text
    assert 'hearth_model_expert_balancedness{layers="all",model="tiny-moe"' in metrics
    assert metrics.count("hearth_expert_tokens_total{") == 4 * 16
    found = json.loads(moe.command("moe", "balance", "--model", MODEL, "--gpus", "2", "--json").stdout)
    loads = found["loads"]
    # Each token goes to two experts, in every layer.
    assert len(loads) == 4 and len({sum(layer) for layer in loads}) == 1 and sum(loads[0]) % 2 == 0
    assert found["balance"]["linear"]["overall"] <= found["balance"]["rebalanced"]["overall"]


def test_a_killed_rank_takes_its_runner_along_and_it_is_started_anew(
    moe: Hearth, moe_client: openai.OpenAI
) -> None:
    leader = runner_of(moe)
    os.kill(ranks_of(moe)[1].pid, signal.SIGKILL)
    # In the midst of an answer: the other rank waits for the killed one's part and hears no SIGTERM.
    with pytest.raises(openai.APIStatusError) as caught:
        ask(moe_client, "Hello!")
    assert caught.value.status_code in (500, 502, 503)
    assert not _living({leader}, within_s=60), "the runner did not end"
    until = time.monotonic() + 60
    while (found := moe.status()["models"][0])["pid"] in (None, leader):
        assert time.monotonic() < until, found
        time.sleep(0.2)
    assert found["restarts"] == 1 and found["state"] != "ready" and "status 1" in found["reason"], found
    with pytest.raises(openai.APIStatusError) as refused:
        ask(moe_client, "Hello!")
    assert refused.value.status_code == 503 and float(refused.value.response.headers["retry-after"]) >= 1
