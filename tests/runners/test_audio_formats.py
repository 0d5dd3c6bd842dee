"""A transcript in every answer format."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.runners.audio_formats import (
    Segment,
    Transcript,
    Word,
    body,
    clock,
    delta_event,
    done_event,
    srt,
    usage,
    vtt,
)

TALK = Transcript(
    "transcribe",
    "en",
    3725.4,
    [
        Segment(
            0.0, 2.5, " Good day.", words=[Word(" Good", 0.0, 1.0), Word(" day.", 1.0, 2.5)], tokens=[1, 2]
        ),
        Segment(3600.0, 3725.4, " a --> b\n\nc", words=[Word(" a", 3600.0, 3601.0)], avg_logprob=-0.5),
    ],
)


def test_json() -> None:
    assert json.loads(body(TALK, "json")) == {
        "text": "Good day. a --> b\n\nc",
        "usage": {"type": "duration", "seconds": 3726},
    }


def test_text() -> None:
    assert body(TALK, "text") == b"Good day. a --> b\n\nc\n"


def test_srt() -> None:
    assert srt(TALK) == (
        "1\n00:00:00,000 --> 00:00:02,500\nGood day.\n\n2\n01:00:00,000 --> 01:02:05,400\na -> b c\n\n"
    )


def test_vtt() -> None:
    assert vtt(TALK) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nGood day.\n\n01:00:00.000 --> 01:02:05.400\na -> b c\n\n"
    )


def test_nothing_said() -> None:
    silence = Transcript("transcribe", "en", 2.0, [])
    assert json.loads(body(silence, "json"))["text"] == ""
    assert body(silence, "srt") == b""
    assert body(silence, "vtt") == b"WEBVTT\n\n"
    assert json.loads(body(silence, "verbose_json"))["segments"] == []


def test_verbose_json_carries_what_was_asked_for() -> None:
    both = json.loads(body(TALK, "verbose_json", frozenset({"word", "segment"})))
    assert (both["task"], both["language"], both["duration"]) == ("transcribe", "english", 3725.4)
    assert both["words"][1] == {"word": "day.", "start": 1.0, "end": 2.5}
    assert set(both["segments"][1]) == {
        "id",
        "seek",
        "start",
        "end",
        "text",
        "tokens",
        "temperature",
        "avg_logprob",
        "compression_ratio",
        "no_speech_prob",
    }
    assert [segment["id"] for segment in both["segments"]] == [0, 1]
    assert both["usage"] == {"type": "duration", "seconds": 3726}
    only_words = json.loads(body(TALK, "verbose_json", frozenset({"word"})))
    assert "segments" not in only_words and len(only_words["words"]) == 3
    assert "words" not in json.loads(body(TALK, "verbose_json"))


@pytest.mark.parametrize(
    ("seconds", "charged"), [(10.96, 11), (11.0, 11), (11.0002, 11), (11.02, 12), (0.1, 1)]
)
def test_begun_seconds_count(seconds: float, charged: int) -> None:
    assert usage(seconds) == {"type": "duration", "seconds": charged}


@given(st.floats(0, 360_000))
def test_clock_is_the_time_to_a_millisecond(seconds: float) -> None:
    match = re.fullmatch(r"(\d{2,}):([0-5]\d):([0-5]\d),(\d{3})", clock(seconds, ","))
    assert match is not None
    hours, minutes, whole, milliseconds = map(int, match.groups())
    assert abs(hours * 3600 + minutes * 60 + whole + milliseconds / 1000 - seconds) <= 0.000501


def test_events_are_those_of_the_sdk() -> None:
    from openai.types.audio import TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent

    assert TranscriptionTextDeltaEvent.model_validate(delta_event(" day.")).delta == " day."
    done = TranscriptionTextDoneEvent.model_validate(done_event(TALK))
    assert done.text == TALK.text
    assert done.usage and done.usage.output_tokens == 2 and done.usage.total_tokens == 186_272


def test_verbose_json_is_that_of_the_sdk() -> None:
    from openai.types.audio import TranscriptionVerbose

    answer = TranscriptionVerbose.model_validate_json(
        body(TALK, "verbose_json", frozenset({"word", "segment"})), strict=True
    )
    assert answer.segments and answer.words and answer.usage and answer.usage.seconds == 3726
