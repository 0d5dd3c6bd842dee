"""The first requests of a runner: real ones of its category, with what a right answer looks like. Pure.

They leave nothing for a user's first request to pay for: besides the plain request there is one for each
thing that is set up on first use (vLLM compiles grammars for structured output, for instance).
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import wave
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from engine.runners.spec import Category, RunnerSpec

_SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
_STRUCTURED = {"type": "json_schema", "json_schema": {"name": "warm_up", "schema": _SCHEMA, "strict": True}}
_TOKENS = 8


@dataclass(frozen=True)
class Ask:
    """One request, and a function that says what is wrong with a 200's JSON ('' = nothing)."""

    path: str
    content_type: str
    body: bytes
    judge: Callable[[Any], str]

    def fault(self, status: int, body: bytes) -> str:
        """What is wrong with an answer; '' when it is right."""
        if status != 200:
            return f"status {status}"
        try:
            return self.judge(json.loads(body))
        except ValueError:
            return "not JSON"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            return f"another shape than expected ({type(error).__name__}: {error})"


def warm_up_asks(spec: RunnerSpec) -> list[Ask]:
    """The requests that warm a runner of ``spec``, in order."""
    return _MAKERS[spec.category](spec)


def _json(path: str, judge: Callable[[Any], str], **fields: Any) -> Ask:
    return Ask(path, "application/json", json.dumps(fields).encode(), judge)


def _chat(spec: RunnerSpec) -> list[Ask]:
    return _chats(spec, "Say hello.")


def _vision(spec: RunnerSpec) -> list[Ask]:
    picture = {"type": "image_url", "image_url": {"url": png_url(drawn_picture())}}
    return _chats(spec, [{"type": "text", "text": "What is in this image?"}, picture])


def _chats(spec: RunnerSpec, content: Any) -> list[Ask]:
    path = "/v1/chat/completions"
    common = {
        "model": spec.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": _TOKENS,
        "temperature": 0,
    }
    asks = [_json(path, _judge_chat, **common)]
    if spec.engine == "vllm":
        asks.append(_json(path, _judge_chat, **common, response_format=_STRUCTURED))
    return asks


def _judge_chat(answer: Any) -> str:
    message = answer["choices"][0]["message"]
    said = message.get("content") or message.get("reasoning_content") or message.get("reasoning")
    return "" if said or message.get("tool_calls") else "an empty message"


def _code(spec: RunnerSpec) -> list[Ask]:
    prompt = "def add(a, b):\n    return"
    return [
        _json(
            "/v1/completions", _judge_text, model=spec.model, prompt=prompt, max_tokens=_TOKENS, temperature=0
        )
    ]


def _judge_text(answer: Any) -> str:
    text = answer["choices"][0]["text"]
    return "" if isinstance(text, str) and text else "an empty text"


def _image(spec: RunnerSpec) -> list[Ask]:
    fields = {
        "prompt": "a red circle on a blue background",
        "n": 1,
        "response_format": "b64_json",
        "steps": 1,
    }
    return [_json("/v1/images/generations", _judge_image, model=spec.model, **fields)]


def _judge_image(answer: Any) -> str:
    picture = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
    known = picture.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF"))
    return "" if known else "bytes that are no picture"


def _audio(spec: RunnerSpec) -> list[Ask]:
    boundary = "hearth-warm-up-7d1f0c"
    head = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="model"\r\n\r\n{spec.model}\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="response_format"\r\n\r\njson\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="warm-up.wav"\r\n'
        "content-type: audio/wav\r\n\r\n"
    )
    body = head.encode() + hum_wav() + f"\r\n--{boundary}--\r\n".encode()
    return [Ask("/v1/audio/transcriptions", f"multipart/form-data; boundary={boundary}", body, _judge_audio)]


def _judge_audio(answer: Any) -> str:
    return "" if isinstance(answer["text"], str) else "no text"


def _embedding(spec: RunnerSpec) -> list[Ask]:
    return [_json("/v1/embeddings", _judge_embedding, model=spec.model, input=["A warm hearth.", "Hello"])]


def _judge_embedding(answer: Any) -> str:
    for item in answer["data"]:
        norm = math.sqrt(math.fsum(x * x for x in item["embedding"]))
        if not (math.isfinite(norm) and norm > 0):
            return f"a vector of length {norm}"
    return "" if len(answer["data"]) == 2 else f"{len(answer['data'])} vectors for 2 texts"


def _detection(spec: RunnerSpec) -> list[Ask]:
    fields = {"model": spec.model, "image": png_url(drawn_picture())}
    return [_json("/v1/detections", _judge_detection, **fields)]


def _judge_detection(answer: Any) -> str:
    return "" if isinstance(answer["data"], list) else "no list of boxes"


def drawn_picture(side: int = 96) -> Image.Image:
    """A red disc on white, ``side`` pixels square."""
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill="red")
    return picture


def png_url(picture: Image.Image) -> str:
    """The picture as a data URL."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def hum_wav(seconds: float = 1.0, rate: int = 16_000) -> bytes:
    """A voice-like hum: 16-bit mono, a low tone with harmonics that swells like syllables."""
    samples = bytearray()
    for i in range(int(seconds * rate)):
        t = i / rate
        tone = sum(math.sin(2 * math.pi * 140 * k * t) / k for k in range(1, 8))
        samples += struct.pack("<h", int(5000 * tone * math.sin(math.pi * 4 * t) ** 2))
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(samples))
    return out.getvalue()


_MAKERS: dict[Category, Callable[[RunnerSpec], list[Ask]]] = {
    "chat": _chat,
    "code": _code,
    "vision": _vision,
    "image": _image,
    "audio": _audio,
    "embedding": _embedding,
    "detection": _detection,
}
