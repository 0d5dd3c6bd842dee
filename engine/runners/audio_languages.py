"""The languages of Whisper: codes, English names and the order of their tokens."""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import bad_request, nearest

#: ISO 639 code -> English name, in the order of Whisper's language tokens (the first 99 are those of every
#: model, the hundredth came with large-v3).
LANGUAGES: dict[str, str] = {
    "en": "english",
    "zh": "chinese",
    "de": "german",
    "es": "spanish",
    "ru": "russian",
    "ko": "korean",
    "fr": "french",
    "ja": "japanese",
    "pt": "portuguese",
    "tr": "turkish",
    "pl": "polish",
    "ca": "catalan",
    "nl": "dutch",
    "ar": "arabic",
    "sv": "swedish",
    "it": "italian",
    "id": "indonesian",
    "hi": "hindi",
    "fi": "finnish",
    "vi": "vietnamese",
    "he": "hebrew",
    "uk": "ukrainian",
    "el": "greek",
    "ms": "malay",
    "cs": "czech",
    "ro": "romanian",
    "da": "danish",
    "hu": "hungarian",
    "ta": "tamil",
    "no": "norwegian",
    "th": "thai",
    "ur": "urdu",
    "hr": "croatian",
    "bg": "bulgarian",
    "lt": "lithuanian",
    "la": "latin",
    "mi": "maori",
    "ml": "malayalam",
    "cy": "welsh",
    "sk": "slovak",
    "te": "telugu",
    "fa": "persian",
    "lv": "latvian",
    "bn": "bengali",
    "sr": "serbian",
    "az": "azerbaijani",
    "sl": "slovenian",
    "kn": "kannada",
    "et": "estonian",
    "mk": "macedonian",
    "br": "breton",
    "eu": "basque",
    "is": "icelandic",
    "hy": "armenian",
    "ne": "nepali",
    "mn": "mongolian",
    "bs": "bosnian",
    "kk": "kazakh",
    "sq": "albanian",
    "sw": "swahili",
    "gl": "galician",
    "mr": "marathi",
    "pa": "punjabi",
    "si": "sinhala",
    "km": "khmer",
    "sn": "shona",
    "yo": "yoruba",
    "so": "somali",
    "af": "afrikaans",
    "oc": "occitan",
    "ka": "georgian",
    "be": "belarusian",
    "tg": "tajik",
    "sd": "sindhi",
    "gu": "gujarati",
    "am": "amharic",
    "yi": "yiddish",
    "lo": "lao",
    "uz": "uzbek",
    "fo": "faroese",
    "ht": "haitian creole",
    "ps": "pashto",
    "tk": "turkmen",
    "nn": "nynorsk",
    "mt": "maltese",
    "sa": "sanskrit",
    "lb": "luxembourgish",
    "my": "myanmar",
    "bo": "tibetan",
    "tl": "tagalog",
    "mg": "malagasy",
    "as": "assamese",
    "tt": "tatar",
    "haw": "hawaiian",
    "ln": "lingala",
    "ha": "hausa",
    "ba": "bashkir",
    "jw": "javanese",
    "su": "sundanese",
    "yue": "cantonese",
}

#: Further names that OpenAI accepts -> code.
_OTHER_NAMES: dict[str, str] = {
    "burmese": "my",
    "valencian": "ca",
    "flemish": "nl",
    "haitian": "ht",
    "letzeburgesch": "lb",
    "pushto": "ps",
    "panjabi": "pa",
    "moldavian": "ro",
    "moldovan": "ro",
    "sinhalese": "si",
    "castilian": "es",
    "mandarin": "zh",
}

_BY_NAME = {name: code for code, name in LANGUAGES.items()} | _OTHER_NAMES


def language_code(text: str, *, model: str, served: Iterable[str]) -> str:
    """The code of a language that a request names by code or English name ("en", "English", "en-US").

    Args:
        text: the request's word.
        model: the model's serving name, for messages.
        served: codes that the model knows.

    Raises:
        ApiError: 400 when there is no such language, or the model does not know it.
    """
    known = list(served)
    wanted = text.strip().lower()
    code = wanted if wanted in LANGUAGES else _BY_NAME.get(wanted)
    if code is None and wanted.replace("_", "-").split("-")[0] in LANGUAGES:
        code = wanted.replace("_", "-").split("-")[0]
    if code is None:
        near = nearest(wanted, [*LANGUAGES, *_BY_NAME])
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise bad_request(
            f"Unknown language {text!r}: give an ISO 639-1 code such as 'en', or leave 'language' out.{hint}",
            param="language",
            code="invalid_language",
        )
    if code not in known:
        only = "it is an English-only model" if known == ["en"] else "it was not trained on it"
        raise bad_request(
            f"{model} does not transcribe {LANGUAGES[code]} ({code!r}): {only}. "
            "Leave 'language' out, or choose a multilingual model.",
            param="language",
            code="unsupported_language",
        )
    return code


def language_name(code: str) -> str:
    """The English name that OpenAI's verbose_json carries ("english" for "en"); the code when unknown."""
    return LANGUAGES.get(code, code)
