"""The form's fields: what is accepted, and what each refusal says."""

from __future__ import annotations

import pytest

from engine.errors import ApiError
from engine.runners.audio_languages import LANGUAGES, language_code, language_name
from engine.runners.audio_request import FALLBACK, Ask, read_ask

ENGLISH = ["en"]


def read(task: str = "transcribe", languages: list[str] | None = None, **fields: str | list[str]) -> Ask:
    lists = {name: [value] if isinstance(value, str) else value for name, value in fields.items()}
    return read_ask(
        lists,
        task="translate" if task == "translate" else "transcribe",
        model="whisper",
        languages=languages or ENGLISH,
        can_translate=languages is not None,
    )


def refused(**fields: str | list[str]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**fields)  # type: ignore[arg-type]  # 'task' and 'languages' are never among them
    assert caught.value.status == 400
    return caught.value


def test_nothing_given() -> None:
    assert read() == Ask("transcribe", None, None, FALLBACK, "json", frozenset({"segment"}), False)


def test_everything_given() -> None:
    ask = read(
        language="English",
        prompt="Kennedy",
        temperature="0.3",
        response_format="verbose_json",
        chunking_strategy='{"type": "server_vad"}',
        **{"timestamp_granularities[]": ["word", "segment"]},  # type: ignore[arg-type]  # fields by name
    )
    assert ask == Ask(
        "transcribe", "en", "Kennedy", (0.3,), "verbose_json", frozenset({"word", "segment"}), False
    )
    assert ask.word_times


@pytest.mark.parametrize("name", ["timestamp_granularities", "timestamp_granularities[]"])
def test_lists_with_and_without_brackets(name: str) -> None:
    fields = {name: ["word"], "response_format": ["verbose_json"]}
    ask = read_ask(fields, task="transcribe", model="whisper", languages=ENGLISH, can_translate=False)
    assert ask.granularities == {"word"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [("0", FALLBACK), ("", None), ("1", (1.0,)), ("0,0.4", (0.0, 0.4)), (["0", "0.2"], (0.0, 0.2))],
)
def test_temperature(given: str | list[str], meant: tuple[float, ...] | None) -> None:
    if meant is None:
        assert refused(temperature=given).param == "temperature"
    else:
        assert read(temperature=given).temperatures == meant


@pytest.mark.parametrize("given", ["1.5", "-0.1", "nan", "warm", "inf"])
def test_temperature_out_of_range(given: str) -> None:
    assert refused(temperature=given).param == "temperature"


@pytest.mark.parametrize(
    ("fields", "param", "code", "says"),
    [
        ({"response_format": "xml"}, "response_format", "invalid_value", "verbose_json"),
        ({"response_format": "diarized_json"}, "response_format", "unsupported_parameter", "speakers"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities", "invalid_value", "verbose_json"),
        (
            {"timestamp_granularities[]": "letter", "response_format": "verbose_json"},
            "timestamp_granularities",
            "invalid_value",
            "'letter'",
        ),
        ({"include[]": "logprobs"}, "include", "unsupported_parameter", "avg_logprob"),
        ({"stream": "true", "response_format": "srt"}, "stream", "unsupported_parameter", "srt"),
        ({"stream": "perhaps"}, "stream", "invalid_value", "perhaps"),
        ({"chunking_strategy": "by hand"}, "chunking_strategy", "invalid_value", "auto"),
        ({"known_speaker_names[]": "Jack"}, "known_speaker_names", "unsupported_parameter", "speakers"),
        ({"language": "de"}, "language", "unsupported_language", "English-only"),
        ({"language": "xx"}, "language", "invalid_language", "ISO 639-1"),
        ({"language": "englisch"}, "language", "invalid_language", "'english'"),
        ({"prompt": ["a", "b"]}, "prompt", None, "once"),
    ],
)
def test_refusals(fields: dict[str, str | list[str]], param: str, code: str | None, says: str) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, code)
    assert says in error.message


def test_translation_only_by_a_model_that_can() -> None:
    with pytest.raises(ApiError) as caught:
        read("translate")
    assert caught.value.code == "unsupported_capability"
    assert "whisper does not translate" in caught.value.message
    assert read("translate", languages=["en", "de"]).task == "translate"


@pytest.mark.parametrize("given", ["de", "DE", " de ", "German", "de-AT", "de_DE"])
def test_ways_to_name_a_language(given: str) -> None:
    assert language_code(given, model="whisper", served=LANGUAGES) == "de"


def test_language_names() -> None:
    assert language_name("yue") == "cantonese" and language_name("??") == "??"
    assert language_code("Flemish", model="whisper", served=LANGUAGES) == "nl"
