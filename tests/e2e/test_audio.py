"""Transcription of a public-domain sample, word for word, in every format."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest

from tests.e2e.conftest import ROOT

MODEL = "whisper-tiny-en"
SAMPLE = ROOT / "tests" / "data" / "jfk.flac"
SAID = (
    "And so my fellow Americans ask not what your country can do for you, "
    "ask what you can do for your country."
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


WORDS = words(SAID)


def transcribe(client: openai.OpenAI, **options: Any) -> Any:
    with SAMPLE.open("rb") as sound:
        return client.audio.transcriptions.create(model=MODEL, file=sound, **options)


def test_json_word_for_word(client: openai.OpenAI) -> None:
    assert words(transcribe(client).text) == WORDS


def test_text(client: openai.OpenAI) -> None:
    assert words(transcribe(client, response_format="text", language="en", temperature=0)) == WORDS


@pytest.mark.parametrize(("kind", "mark"), [("srt", "00:00:00,000 --> 00:00:"), ("vtt", "WEBVTT")])
def test_subtitles(client: openai.OpenAI, kind: str, mark: str) -> None:
    said = transcribe(client, response_format=kind)
    assert mark in said
    assert WORDS[-1] in words(said)


def test_verbose_json_with_words_and_segments(client: openai.OpenAI) -> None:
    said = transcribe(
        client, response_format="verbose_json", timestamp_granularities=["word", "segment"], prompt="Kennedy"
    )
    assert [words(word.word)[0] for word in said.words] == WORDS
    starts = [word.start for word in said.words]
    assert starts == sorted(starts) and said.words[-1].end <= 11.1
    assert said.segments and said.language == "english"
    assert abs(said.duration - 11) < 0.1


def test_streaming_events(client: openai.OpenAI) -> None:
    events = list(transcribe(client, stream=True))
    assert words("".join(e.delta for e in events if e.type == "transcript.text.delta")) == WORDS
    assert events[-1].type == "transcript.text.done" and words(events[-1].text) == WORDS


def test_an_english_model_does_not_translate(client: openai.OpenAI) -> None:
    with SAMPLE.open("rb") as sound, pytest.raises(openai.BadRequestError) as caught:
        client.audio.translations.create(model=MODEL, file=sound)
    assert MODEL in caught.value.message


@pytest.mark.parametrize("data", [b"", b"no sound at all", SAMPLE.read_bytes()[:3000]])
def test_bad_sound(client: openai.OpenAI, data: bytes) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model=MODEL, file=("a.flac", data))
    assert caught.value.param == "file"
