"""A transcript in the shapes that OpenAI's transcription answers have: pure functions of data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from engine.runners.audio_languages import language_name

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
Task = Literal["transcribe", "translate"]

#: Answer format -> content type, as OpenAI sends them.
CONTENT_TYPES: Final[dict[Format, str]] = {
    "json": "application/json",
    "verbose_json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "text/plain; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}

_POSITIONS_A_SECOND: Final = 50


@dataclass(frozen=True)
class Word:
    """A word and its times in seconds."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, its times in seconds, and how sure the model was."""

    start: float
    end: float
    text: str
    seek: int = 0
    tokens: list[int] = field(default_factory=list)
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    words: list[Word] = field(default_factory=list)


@dataclass(frozen=True)
class Transcript:
    """What was said in ``duration`` seconds of sound. ``language`` is that of the text, as a code."""

    task: Task
    language: str
    duration: float
    segments: list[Segment]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()


def body(
    transcript: Transcript, shape: Format, granularities: frozenset[str] = frozenset({"segment"})
) -> bytes:
    """The answer's body, UTF-8.

    ``granularities`` ("segment", "word") say which lists verbose_json carries; the other formats ignore them.
    """
    if shape == "json":
        return msgspec.json.encode({"text": transcript.text, "usage": usage(transcript.duration)})
    if shape == "verbose_json":
        return msgspec.json.encode(verbose(transcript, granularities))
    if shape == "srt":
        return srt(transcript).encode()
    if shape == "vtt":
        return vtt(transcript).encode()
    return (transcript.text + "\n").encode()


def usage(duration: float) -> dict[str, Any]:
    """What is charged: whole seconds of sound, begun ones counted."""
    # Resampling adds or takes a few samples; they must not make a second.
    return {"type": "duration", "seconds": math.ceil(round(duration, 2))}


def verbose(transcript: Transcript, granularities: frozenset[str]) -> dict[str, Any]:
    """OpenAI's verbose_json."""
    answer: dict[str, Any] = {
        "task": transcript.task,
        "language": language_name(transcript.language),
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
    }
    if "segment" in granularities:
        answer["segments"] = [_verbose_segment(i, segment) for i, segment in enumerate(transcript.segments)]
    if "word" in granularities:
        answer["words"] = [
            {"word": word.word.strip(), "start": word.start, "end": word.end}
            for segment in transcript.segments
            for word in segment.words
        ]
    answer["usage"] = usage(transcript.duration)
    return answer


def srt(transcript: Transcript) -> str:
    """SubRip: numbered blocks, comma before the milliseconds."""
    blocks = (
        f"{i}\n{clock(s.start, ',')} --> {clock(s.end, ',')}\n{_line(s.text)}\n\n"
        for i, s in enumerate(transcript.segments, 1)
    )
    return "".join(blocks)


def vtt(transcript: Transcript) -> str:
    """WebVTT."""
    blocks = (
        f"{clock(s.start, '.')} --> {clock(s.end, '.')}\n{_line(s.text)}\n\n" for s in transcript.segments
    )
    return "WEBVTT\n\n" + "".join(blocks)


def clock(seconds: float, mark: str) -> str:
    """hours:minutes:seconds, ``mark``, milliseconds; as many hours as it takes."""
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{mark}{milliseconds % 1000:03}"


def delta_event(text: str) -> dict[str, Any]:
    """A streamed piece of the transcript."""
    return {"type": "transcript.text.delta", "delta": text}


def done_event(transcript: Transcript) -> dict[str, Any]:
    """The last event of a streamed transcript.

    OpenAI's event counts tokens, not seconds: the positions of Whisper's encoder (50 a second of sound) and
    the tokens of the text. The seconds stand beside them.
    """
    heard = math.ceil(transcript.duration * _POSITIONS_A_SECOND)
    written = sum(len(segment.tokens) for segment in transcript.segments)
    tokens = {
        "type": "tokens",
        "input_tokens": heard,
        "input_token_details": {"audio_tokens": heard},
        "output_tokens": written,
        "total_tokens": heard + written,
        "seconds": usage(transcript.duration)["seconds"],
    }
    return {"type": "transcript.text.done", "text": transcript.text, "usage": tokens}


def _verbose_segment(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": segment.seek,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": segment.tokens,
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def _line(text: str) -> str:
    # An arrow or a blank line inside a cue would end it.
    return " ".join(text.split()).replace("-->", "->")
