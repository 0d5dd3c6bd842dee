"""Forms: the model is found wherever it stands, and the bytes go on as they came."""

from __future__ import annotations

import os
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ApiError
from engine.gateway.multipart import multipart_head
from tests.gateway.dummy import DummyRunner, House, route

TYPE = b"multipart/form-data; boundary=XX"


def part(head: str, value: bytes) -> bytes:
    return b"--XX\r\n" + f"Content-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--XX--\r\n"


MODEL = part('name="model"', b"whisper")
FILE = part('name="file"; filename="a.wav"', bytes(range(256)) * 8)


@pytest.mark.parametrize("parts", [(MODEL, FILE), (FILE, MODEL)])
def test_the_model_is_found_before_and_after_the_file(parts: tuple[bytes, bytes]) -> None:
    assert multipart_head(form(*parts), TYPE)[:2] == ("whisper", False)


@pytest.mark.parametrize(
    ("value", "stream"), [(b"true", True), (b"True", True), (b"1", True), (b"false", False)]
)
def test_stream_is_read(value: bytes, stream: bool) -> None:
    assert multipart_head(form(MODEL, part('name="stream"', value), FILE), TYPE).stream is stream


def test_a_quoted_boundary_and_other_headers_are_understood() -> None:
    body = form(
        b'--XX\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    )
    assert multipart_head(body, b'Multipart/Form-Data; charset=utf-8; boundary="XX"').model == "whisper"


def test_a_file_named_model_is_no_model() -> None:
    with pytest.raises(ApiError) as caught:
        multipart_head(form(part('name="model"; filename="m"', b"whisper"), FILE), TYPE)
    assert (caught.value.status, caught.value.param) == (400, "model")


@given(st.binary(max_size=300))
def test_no_file_hides_the_model(data: bytes) -> None:
    if b"\r\n--XX" in data:
        return
    body = form(part('name="file"; filename="f"', data), MODEL)
    assert multipart_head(body, TYPE).model == "whisper"


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{}", b"application/json", 415, "unsupported_media_type"),
        (b"{}", None, 415, "unsupported_media_type"),
        (form(MODEL), b"multipart/form-data", 400, "invalid_multipart"),
        (form(MODEL)[:-8], TYPE, 400, "invalid_multipart"),
        (b"", TYPE, 400, "invalid_multipart"),
        (b"nonsense", TYPE, 400, "invalid_multipart"),
        (form(FILE), TYPE, 400, "missing_required_parameter"),
        (form(part('name="model"', b"")), TYPE, 400, "missing_required_parameter"),
        (form(part('name="model"', b"x" * 5000)), TYPE, 400, None),
        (form(MODEL), b"multipart/form-data; boundary=" + b"y" * 1000, 400, "invalid_multipart"),
    ],
)
def test_a_form_that_cannot_be_read(body: bytes, kind: bytes | None, status: int, code: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        multipart_head(body, kind)
    assert (caught.value.status, caught.value.code) == (status, code)


async def test_a_transcription_passes_byte_for_byte(
    house: House, runner: DummyRunner, tmp_path: Path
) -> None:
    house.serve(route("ears", runner, category="audio"))
    sound = tmp_path / "a.wav"
    sound.write_bytes(os.urandom(300_000))
    runner.behaviour, runner.body = "fixed", b'{"text": "hello"}'
    answer = await house.openai.audio.transcriptions.create(model="ears", file=sound)
    assert answer.text == "hello"
    path, headers, body = runner.seen[0]
    assert path == "/v1/audio/transcriptions"
    assert sound.read_bytes() in body
    assert multipart_head(body, headers["content-type"].encode()).model == "ears"


async def test_a_text_answer_passes_as_text(house: House, runner: DummyRunner, tmp_path: Path) -> None:
    house.serve(route("ears", runner, category="audio"))
    runner.behaviour, runner.body = "fixed", b"1\n00:00:00,000 --> 00:00:01,000\nhello\n"
    runner.headers = {"content-type": "text/plain; charset=utf-8"}
    answer = await house.openai.audio.transcriptions.create(
        model="ears", file=("a.wav", b"x"), response_format="srt"
    )
    assert answer == runner.body.decode()


async def test_a_form_for_another_category_is_refused(house: House) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await house.openai.audio.transcriptions.create(model="dummy", file=("a.wav", b"x"))
    assert caught.value.code == "wrong_category"


async def test_detections_take_a_form_and_json(house: House, runner: DummyRunner) -> None:
    house.serve(route("eyes", runner, category="detection"))
    body = form(part('name="image"; filename="a.png"', b"\x89PNG"), part('name="model"', b"eyes"))
    status, _, _ = await house.post("/v1/detections", data=body, headers={"content-type": TYPE.decode()})
    assert status == 200
    assert runner.seen[0][2] == body
