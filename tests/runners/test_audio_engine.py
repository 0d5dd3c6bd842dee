"""The audio runner as its own process with the real Whisper tiny.en: the sample word for word."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import openai
import psutil
import pytest

from models.catalog import load_catalog
from models.prepare import prepare
from tests.runners.audio_files import SAID, SAMPLE, sound, speech, until, words
from tests.runners.conftest import ROOT, Started, StartRunner

pytestmark = pytest.mark.engines

Timed = list[tuple[float, float]]


@pytest.fixture(scope="module")
def weights() -> Path:
    """The tiny profile's Whisper, where `hearth serve` keeps it too."""
    entry = load_catalog().find("whisper-tiny-en")
    return prepare(entry, ROOT / "var" / "weights", offline=False, report=lambda _: None)


@pytest.fixture
async def runner(start_runner: StartRunner, weights: Path) -> Started:
    started = start_runner(
        "engine.runners.audio",
        model="whisper-tiny-en",
        aliases=["whisper-1"],
        category="audio",
        engine="faster-whisper",
        model_dir=weights,
        max_batch=4,
        can_sleep=True,
    )
    await started.ready()
    return started


@pytest.fixture
def client(runner: Started) -> Iterator[openai.OpenAI]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(runner.socket)), timeout=120) as http:
        yield openai.OpenAI(api_key="k", base_url="http://runner/v1", http_client=http, max_retries=0)


def transcribe(client: openai.OpenAI, data: bytes | None = None, **options: Any) -> Any:
    file = ("clip", data if data is not None else SAMPLE.read_bytes())
    return client.audio.transcriptions.create(model="whisper-1", file=file, **options)


async def test_the_sample_in_every_format(client: openai.OpenAI) -> None:
    def check() -> None:
        assert words(transcribe(client).text) == SAID
        assert words(transcribe(client, response_format="text", language="en", temperature=0)) == SAID
        srt = transcribe(client, response_format="srt")
        assert srt.startswith("1\n00:00:00,000 --> 00:00:") and words(srt) == SAID
        vtt = transcribe(client, response_format="vtt")
        assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:") and words(vtt)[1:] == SAID

        verbose = transcribe(
            client,
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
            prompt="Kennedy",
        )
        assert (verbose.language, verbose.duration, verbose.usage.seconds) == ("english", 11.0, 11)
        assert words(verbose.text) == SAID and words(" ".join(s.text for s in verbose.segments)) == SAID
        assert [words(word.word)[0] for word in verbose.words] == SAID
        in_order([(word.start, word.end) for word in verbose.words])
        in_order([(segment.start, segment.end) for segment in verbose.segments])

        events = list(transcribe(client, stream=True))
        assert words("".join(e.delta for e in events if e.type == "transcript.text.delta")) == SAID
        assert events[-1].type == "transcript.text.done" and words(events[-1].text) == SAID

    await asyncio.to_thread(check)


def in_order(times: Timed) -> None:
    assert times and all(0 <= start <= end <= 11.1 for start, end in times)
    assert all(one[1] <= next_[0] + 0.001 for one, next_ in itertools.pairwise(times))


async def test_every_container_and_rate(client: openai.OpenAI) -> None:
    def check() -> None:
        for kind in (
            ("wav", "pcm_s16le", 16000, "mono"),
            ("wav", "pcm_s16le", 44100, "stereo"),
            ("mp3", "mp3", 44100, "stereo"),
            ("ogg", "libopus", 48000, "mono"),
            ("mp4", "aac", 44100, "stereo"),
            ("webm", "libopus", 48000, "mono"),
        ):
            assert words(transcribe(client, speech(*kind)).text) == SAID, kind

    await asyncio.to_thread(check)


async def test_where_nobody_speaks_nothing_is_invented(client: openai.OpenAI) -> None:
    def check() -> None:
        numbers = np.random.default_rng(0)
        for samples in (
            np.zeros(80_000),
            numbers.standard_normal(80_000) * 0.02,
            np.sin(np.arange(80_000) / 6),
        ):
            answer = transcribe(client, sound(np.clip(samples, -1, 1)), response_format="verbose_json")
            assert (answer.text, answer.segments, answer.duration) == ("", [], 5.0)
        assert transcribe(client, sound(np.zeros(16_000)), response_format="vtt") == "WEBVTT\n\n"

    await asyncio.to_thread(check)


async def post(runner: Started, data: bytes, **fields: str) -> Any:
    form = aiohttp.FormData({"model": "whisper-tiny-en", **fields})
    form.add_field("file", data, filename="clip")
    async with runner.session() as session, session.post("/v1/audio/transcriptions", data=form) as answer:
        return json.loads(await answer.text())


async def metric(runner: Started, name: str) -> float:
    async with runner.session() as session, session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def test_clips_of_several_requests_share_batches_and_stay_exact(runner: Started) -> None:
    alone = await post(runner, SAMPLE.read_bytes(), response_format="verbose_json")
    cut = sound(np.concatenate([np.zeros(8000), np.zeros(80_000)]))
    before = await metric(runner, "hearth_runner_batch_size_count")
    sent = await metric(runner, "hearth_runner_batch_size_sum")
    answers = await asyncio.gather(
        *(post(runner, SAMPLE.read_bytes(), response_format="verbose_json") for _ in range(4)),
        post(runner, cut),
    )
    assert answers[:4] == [alone] * 4
    assert answers[4]["text"] == ""
    batches = await metric(runner, "hearth_runner_batch_size_count") - before
    calls = await metric(runner, "hearth_runner_batch_size_sum") - sent
    assert calls == 4 and batches < calls


async def test_after_a_sleep_it_hears_the_same(runner: Started, weights: Path) -> None:
    before = await post(runner, SAMPLE.read_bytes(), response_format="verbose_json")
    for _ in range(2):
        await runner.sleeps_and_wakes(weights)
        assert await post(runner, SAMPLE.read_bytes(), response_format="verbose_json") == before


async def test_a_client_that_goes_stops_its_work(runner: Started) -> None:
    """Forty windows would take many seconds; the runner is idle again within a window's time."""
    minutes = np.tile(np.frombuffer(speech("wav", "pcm_s16le")[-352_000:], np.int16), 40) / 32768
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(4):
            await post(runner, sound(minutes))
    process = psutil.Process(runner.process.pid)
    until_s = time.monotonic() + 20
    while process.cpu_percent(0.5) > 20:
        assert time.monotonic() < until_s, "still computing for a client that has gone"
    assert words((await post(runner, SAMPLE.read_bytes()))["text"]) == SAID


async def test_sigterm_finishes_what_runs(runner: Started) -> None:
    task = asyncio.create_task(post(runner, SAMPLE.read_bytes()))
    while await metric(runner, "hearth_runner_in_flight") < 1:
        pass
    runner.process.terminate()
    assert words((await task)["text"]) == SAID
    await until(lambda: runner.process.poll() is not None, 30)
    assert runner.process.returncode == 0 and not runner.socket.exists()
