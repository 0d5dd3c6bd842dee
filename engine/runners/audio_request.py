"""A transcription request out of its multipart form: checked, typed, without the sound. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from engine.errors import ApiError, bad_request
from engine.runners.audio_formats import Format, Task
from engine.runners.audio_languages import language_code

FORMATS: Final[tuple[Format, ...]] = get_args(Format)
GRANULARITIES: Final = ("word", "segment")

#: Whisper's own ladder: a window whose text repeats itself or is improbable is decoded again, warmer.
FALLBACK: Final = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

_TRUE: Final = ("true", "1", "yes", "on")
_FALSE: Final = ("false", "0", "no", "off", "")

#: Fields of OpenAI's newer models that no Whisper can follow -> why.
_REFUSED: Final = {
    "known_speaker_names": "Whisper does not tell speakers apart",
    "known_speaker_references": "Whisper does not tell speakers apart",
}


@dataclass(frozen=True)
class Ask:
    """What is wanted of one clip. ``language`` None means: detect it."""

    task: Task = "transcribe"
    language: str | None = None
    prompt: str | None = None
    temperatures: tuple[float, ...] = FALLBACK
    format: Format = "json"
    granularities: frozenset[str] = frozenset({"segment"})
    stream: bool = False

    @property
    def word_times(self) -> bool:
        return "word" in self.granularities


def read_ask(
    fields: Mapping[str, Sequence[str]],
    *,
    task: Task,
    model: str,
    languages: Iterable[str],
    can_translate: bool,
) -> Ask:
    """The text fields of a form as an :class:`Ask`.

    Args:
        fields: field name -> its values in order. Lists may be named with brackets
            ("timestamp_granularities[]", as the SDK sends them) or without.
        task: which endpoint was called.
        model: its serving name, for messages.
        languages: codes that the model knows.
        can_translate: whether the model translates into English.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    for name, why in _REFUSED.items():
        if _many(fields, name):
            raise _unsupported(f"{name!r} is not supported: {why}. Leave it out.", name)
    if task == "translate" and not can_translate:
        raise bad_request(
            f"{model} does not translate: it is English-only or was not trained to. "
            "Use /v1/audio/transcriptions, or send the request to a multilingual Whisper model.",
            param="model",
            code="unsupported_capability",
        )
    shape = _format(fields)
    stream = _flag(fields, "stream")
    if stream and shape not in ("json", "text"):
        raise bad_request(
            f"stream=true sends transcript events, not {shape}. Use response_format 'json' or leave it out.",
            param="stream",
            code="unsupported_parameter",
        )
    _check_include(fields)
    _check_chunking(fields)
    language = _one(fields, "language")
    return Ask(
        task=task,
        language=language_code(language, model=model, served=languages)
        if language and task == "transcribe"
        else None,
        prompt=_one(fields, "prompt") or None,
        temperatures=_temperatures(fields),
        format=shape,
        granularities=_granularities(fields, shape),
        stream=stream,
    )


def _many(fields: Mapping[str, Sequence[str]], name: str) -> list[str]:
    return [value for key in (name, f"{name}[]") for value in fields.get(key, ())]


def _one(fields: Mapping[str, Sequence[str]], name: str) -> str | None:
    values = _many(fields, name)
    if len(values) > 1:
        raise bad_request(f"{name!r} is given {len(values)} times; give it once.", param=name)
    return values[0] if values else None


def _format(fields: Mapping[str, Sequence[str]]) -> Format:
    given = _one(fields, "response_format")
    for known in FORMATS:
        if given == known:
            return known
    if not given:
        return "json"
    if given == "diarized_json":
        raise _unsupported(
            "'diarized_json' is not supported: Whisper does not tell speakers apart.", "response_format"
        )
    raise bad_request(
        f"Unknown response_format {given!r}. It must be one of {', '.join(FORMATS)}.",
        param="response_format",
        code="invalid_value",
    )


def _granularities(fields: Mapping[str, Sequence[str]], shape: Format) -> frozenset[str]:
    given = _many(fields, "timestamp_granularities")
    for value in given:
        if value not in GRANULARITIES:
            raise bad_request(
                f"Unknown timestamp granularity {value!r}. It must be one of {', '.join(GRANULARITIES)}.",
                param="timestamp_granularities",
                code="invalid_value",
            )
    if given and shape != "verbose_json":
        raise bad_request(
            f"timestamp_granularities needs response_format 'verbose_json'; it is {shape!r}.",
            param="timestamp_granularities",
            code="invalid_value",
        )
    return frozenset(given) or frozenset({"segment"})


def _temperatures(fields: Mapping[str, Sequence[str]]) -> tuple[float, ...]:
    """None or 0: Whisper's ladder, as at OpenAI; above: that one; several (repeated by commas): a ladder."""
    texts = [part for value in _many(fields, "temperature") for part in value.split(",")]
    try:
        given = tuple(float(text) for text in texts)
    except ValueError:
        given = (-1.0,)
    if not all(0 <= value <= 1 for value in given):  # also refuses NaN
        raise bad_request(
            f"Invalid temperature {','.join(texts)!r}: it must be a number from 0 to 1.",
            param="temperature",
            code="invalid_value",
        )
    return FALLBACK if given in ((), (0.0,)) else given


def _flag(fields: Mapping[str, Sequence[str]], name: str) -> bool:
    given = (_one(fields, name) or "").strip().lower()
    if given not in (*_TRUE, *_FALSE):
        raise bad_request(f"{name!r} must be true or false, not {given!r}.", param=name, code="invalid_value")
    return given in _TRUE


def _check_include(fields: Mapping[str, Sequence[str]]) -> None:
    for value in _many(fields, "include"):
        if value == "logprobs":
            raise _unsupported(
                "include[]=logprobs is not supported: Whisper's decoder gives no token probabilities here. "
                "response_format 'verbose_json' has avg_logprob for each segment.",
                "include",
            )
        raise bad_request(f"Unknown include[] value {value!r}.", param="include", code="invalid_value")


def _check_chunking(fields: Mapping[str, Sequence[str]]) -> None:
    """'auto' and 'server_vad' both say what happens anyway: sound is cut where nobody speaks."""
    strategy = _one(fields, "chunking_strategy")
    if strategy in (None, "", "auto", "server_vad") or (strategy or "").lstrip().startswith("{"):
        return
    raise bad_request(
        f"Unknown chunking_strategy {strategy!r}. It must be 'auto' or a server_vad object.",
        param="chunking_strategy",
        code="invalid_value",
    )


def _unsupported(message: str, param: str) -> ApiError:
    return bad_request(message, param=param, code="unsupported_parameter")
