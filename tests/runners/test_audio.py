"""The audio endpoints over HTTP, with a model that hears what it is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engine.runners.audio import WhisperEngine
from engine.runners.audio_request import Ask
from engine.runners.base import Runner, make_app
from engine.runners.spec import RunnerSpec
from tests.runners.audio_files import sound, until

WAV = sound(np.sin(np.arange(32000) / 20).astype(np.float32))


class FakeModel:
    """Two segments for every clip, with its options in the text."""

    def __init__(self, languages: list[str]) -> None:
        self.hf_tokenizer = SimpleNamespace(encode_special_tokens=False)
        self.feature_extractor = SimpleNamespace(sampling_rate=16000)
        self.model = SimpleNamespace(is_multilingual=len(languages) > 1)
        self.supported_languages = languages
        self.asked: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False

    def transcribe(self, samples: np.ndarray[Any, Any], **options: Any) -> tuple[Any, Any]:
        self.asked.append({"samples": len(samples), **options})
        if self.fails:
            raise RuntimeError("a secret of the engine")

        def segments() -> Any:
            for number, text in enumerate((" Good day,", " world.")):
                if number:
                    self.gate.wait(5)
                found = [SimpleNamespace(word=text, start=np.float64(number), end=np.float64(number + 1))]
                yield SimpleNamespace(
                    start=np.float64(number),
                    end=float(number + 1),
                    text=text,
                    seek=0,
                    tokens=[number],
                    temperature=0.0,
                    avg_logprob=-0.25,
                    compression_ratio=1.0,
                    no_speech_prob=0.01,
                    words=found if options["word_timestamps"] else None,
                )

        return segments(), SimpleNamespace(language=options["language"] or "en")


class Served:
    """An engine with a fake model, and a client for it."""

    def __init__(self, tmp_path: Path, languages: list[str], **over: Any) -> None:
        facts = {
            "model": "whisper",
            "aliases": ["whisper-1"],
            "category": "audio",
            "engine": "faster-whisper",
        }
        spec = RunnerSpec(model_dir=tmp_path, socket=tmp_path / "s", **(facts | over))
        self.runner = Runner(spec)
        self.engine = WhisperEngine(spec)
        self.model = FakeModel(languages)
        app = make_app(self.engine, self.runner)
        self.engine.take(self.model)
        self.runner.state = "ok"
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://runner")
        self.openai = openai.AsyncOpenAI(
            api_key="k", base_url="http://runner/v1", http_client=self.http, max_retries=0
        )

    async def post(self, file: Any = ("a.wav", WAV), path: str = "transcriptions", **fields: Any) -> Any:
        data = {"model": "whisper"} | fields
        return await self.http.post(
            f"/v1/audio/{path}", data={k: v for k, v in data.items() if v is not None}, files={"file": file}
        )

    async def refused(self, status: int = 400, **given: Any) -> dict[str, Any]:
        answer = await self.post(**given)
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


Serve = Callable[..., Served]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    made: list[Served] = []

    def make(languages: list[str] | None = None, **over: Any) -> Served:
        made.append(Served(tmp_path, languages or ["en"], **over))
        return made[-1]

    yield make
    for served in made:
        served.model.gate.set()
        await served.http.aclose()
        await served.runner.close()


async def test_json_is_the_default(serve: Serve) -> None:
    served = serve()
    answer = await served.post()
    assert answer.status_code == 200
    assert answer.json() == {"text": "Good day, world.", "usage": {"type": "duration", "seconds": 2}}
    assert served.model.asked[0]["samples"] == 32000
    assert served.model.asked[0]["vad_filter"] is True


@pytest.mark.parametrize(
    ("shape", "kind", "text"),
    [
        ("text", "text/plain; charset=utf-8", "Good day, world.\n"),
        (
            "srt",
            "text/plain; charset=utf-8",
            "1\n00:00:00,000 --> 00:00:01,000\nGood day,\n\n2\n00:00:01,000 --> 00:00:02,000\nworld.\n\n",
        ),
        (
            "vtt",
            "text/vtt; charset=utf-8",
            "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nGood day,\n\n00:00:01.000 --> 00:00:02.000\nworld.\n\n",
        ),
    ],
)
async def test_plain_formats(serve: Serve, shape: str, kind: str, text: str) -> None:
    answer = await serve().post(response_format=shape)
    assert (answer.headers["content-type"], answer.text) == (kind, text)


async def test_verbose_json_through_the_sdk(serve: Serve) -> None:
    served = serve()
    answer = await served.openai.audio.transcriptions.create(
        model="whisper-1",
        file=("a.wav", WAV),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
        prompt="A greeting.",
        temperature=0.5,
    )
    assert answer.words and [word.word for word in answer.words] == ["Good day,", "world."]
    assert answer.segments and [segment.id for segment in answer.segments] == [0, 1]
    assert (answer.language, answer.duration) == ("english", 2.0)
    asked = served.model.asked[0]
    assert asked["word_timestamps"] and asked["temperature"] == [0.5]
    assert (asked["language"], asked["initial_prompt"]) == ("en", "A greeting.")


async def test_streaming_through_the_sdk(serve: Serve) -> None:
    served = serve()
    events = [
        event
        async for event in await served.openai.audio.transcriptions.create(
            model="whisper", file=("a.wav", WAV), stream=True
        )
    ]
    assert [event.type for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert "".join(event.delta for event in events[:2]) == "Good day, world." == events[2].text


async def test_a_segment_is_sent_as_soon_as_it_is_found(serve: Serve) -> None:
    served = serve()
    served.model.gate.clear()
    events = served.engine._events(Ask(stream=True), np.zeros(16000, np.float32), 1.0)
    assert b"Good day," in await anext(events)
    served.model.gate.set()
    assert [b"world" in event async for event in events] == [True, True]


async def test_a_failure_before_the_first_event_keeps_its_status(serve: Serve) -> None:
    served = serve()
    served.model.fails = True
    answer = await served.post(stream="true")
    assert answer.status_code == 500 and "secret" not in answer.text


async def test_translation_by_a_multilingual_model(serve: Serve) -> None:
    served = serve(["en", "de"])
    answer = await served.post(path="translations", response_format="verbose_json")
    assert (answer.json()["task"], answer.json()["language"]) == ("translate", "english")
    assert served.model.asked[0]["task"] == "translate" and served.model.asked[0]["language"] is None


@pytest.mark.parametrize(
    ("languages", "capabilities"), [(["en"], []), (["en", "de"], ["audio.transcriptions"])]
)
async def test_translation_refused(serve: Serve, languages: list[str], capabilities: list[str]) -> None:
    error = await serve(languages, capabilities=capabilities).refused(path="translations")
    assert error["code"] == "unsupported_capability" and "whisper does not translate" in error["message"]


async def test_a_detected_language_is_named(serve: Serve) -> None:
    served = serve(["en", "de"])
    answer = await served.post(response_format="verbose_json", language="German")
    assert answer.json()["language"] == "german" and served.model.asked[0]["language"] == "de"


@pytest.mark.parametrize(
    ("given", "status", "param", "code"),
    [
        ({"file": ("a.wav", b"")}, 400, "file", "empty_audio"),
        ({"file": ("a.wav", b"junk")}, 400, "file", "invalid_audio"),
        ({"file": ("a.wav", WAV[:5000])}, 400, "file", "invalid_audio"),
        ({"file": ("a.wav", bytes(70_000))}, 413, "file", "audio_too_large"),
        ({"model": None}, 400, "model", "missing_field"),
        ({"model": "whispr"}, 404, "model", "model_not_found"),
        ({"language": "de"}, 400, "language", "unsupported_language"),
        ({"response_format": "diarized_json"}, 400, "response_format", "unsupported_parameter"),
    ],
)
async def test_refusals(serve: Serve, given: dict[str, Any], status: int, param: str, code: str) -> None:
    served = serve(options={"max_bytes": 66_000})
    error = await served.refused(status, **given)
    assert (error["param"], error["code"]) == (param, code)
    assert not served.model.asked


async def test_too_long(serve: Serve) -> None:
    error = await serve(options={"max_seconds": 1.5}).refused()
    assert error["code"] == "audio_too_long"


async def test_bodies_that_are_no_form(serve: Serve) -> None:
    served = serve()
    answer = await served.http.post("/v1/audio/transcriptions", json={"model": "whisper"})
    assert answer.status_code == 400 and "multipart/form-data" in answer.json()["error"]["message"]
    answer = await served.http.post(
        "/v1/audio/transcriptions", data={"model": "whisper"}, files={"other": ("a.wav", WAV)}
    )
    assert answer.json()["error"]["code"] == "missing_field"
    headers = {"content-type": "multipart/form-data"}
    answer = await served.http.post("/v1/audio/transcriptions", content=b"x", headers=headers)
    assert answer.status_code == 400


async def test_text_where_the_file_should_be(serve: Serve) -> None:
    served = serve()
    body = (
        '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
        '--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nnot a file\r\n--b--\r\n'
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await served.http.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert answer.json()["error"]["param"] == "file"


async def test_an_engine_failure_shows_no_inside(serve: Serve) -> None:
    served = serve()
    served.model.fails = True
    answer = await served.post()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error" and "secret" not in answer.text


async def test_more_than_the_queue_holds_is_429(serve: Serve) -> None:
    served = serve(max_batch=1, max_queue=1)
    served.model.gate.clear()
    first = [asyncio.create_task(served.post()) for _ in range(2)]
    await until(lambda: served.engine._slots._waiting == 1 and bool(served.model.asked))
    error = await served.refused(429)
    assert error["code"] == "queue_full"
    served.model.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]


async def test_control_tokens_in_a_prompt_stay_text(serve: Serve) -> None:
    assert serve().model.hf_tokenizer.encode_special_tokens is True


def test_a_folder_that_lacks_files_says_so(tmp_path: Path) -> None:
    spec = RunnerSpec(
        model="w", category="audio", engine="faster-whisper", model_dir=tmp_path, socket=tmp_path / "s"
    )
    with pytest.raises(FileNotFoundError, match=r"no model\.bin.*Prepare"):
        WhisperEngine(spec).load()
