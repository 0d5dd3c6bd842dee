"""Decoding: every container, bounded, and broken files told apart from whole ones."""

from __future__ import annotations

import io
import math
import wave

import numpy as np
import pytest
from faster_whisper.audio import decode_audio as library_decode

from engine.errors import ApiError
from engine.runners.audio_decode import SAMPLE_RATE, decode_audio, sniff
from tests.runners.audio_files import SAMPLE, sound, speech

KINDS = [
    ("wav", "pcm_s16le", 16000, "mono"),
    ("wav", "pcm_s16le", 44100, "stereo"),
    ("wav", "pcm_f32le", 8000, "mono"),
    ("flac", "flac", 48000, "stereo"),
    ("mp3", "mp3", 44100, "stereo"),
    ("ogg", "libopus", 48000, "mono"),
    ("mp4", "aac", 44100, "stereo"),
    ("webm", "libopus", 48000, "stereo"),
    ("mpeg", "mp2", 44100, "stereo"),
    ("adts", "aac", 44100, "mono"),
]


def code_of(data: bytes, max_seconds: float = 60) -> str | None:
    with pytest.raises(ApiError) as caught:
        decode_audio(data, max_seconds=max_seconds)
    assert (caught.value.status, caught.value.param) == (400, "file")
    return caught.value.code


@pytest.mark.parametrize(("container", "codec", "rate", "layout"), KINDS)
def test_every_container(container: str, codec: str, rate: int, layout: str) -> None:
    samples = decode_audio(speech(container, codec, rate, layout), max_seconds=60)
    reference = decode_audio(SAMPLE.read_bytes(), max_seconds=60)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) / SAMPLE_RATE - 11) < 0.1
    # The same sound, whatever delay the codec adds: the loudness of its quarter seconds goes together.
    loudness = [np.sqrt(np.mean(x[: 43 * 4000].reshape(43, 4000) ** 2, axis=1)) for x in (samples, reference)]
    assert np.corrcoef(*loudness)[0, 1] > 0.95


def test_the_samples_are_those_of_the_library() -> None:
    data = SAMPLE.read_bytes()
    assert np.array_equal(decode_audio(data, max_seconds=60), library_decode(io.BytesIO(data)))


@pytest.mark.parametrize(("container", "codec", "rate", "layout"), KINDS[:8])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_truncated(container: str, codec: str, rate: int, layout: str, share: float) -> None:
    data = speech(container, codec, rate, layout)
    assert code_of(data[: int(len(data) * share)]) == "invalid_audio"


def test_zero_bytes() -> None:
    assert code_of(b"") == "empty_audio"


def test_a_header_without_sound() -> None:
    out = io.BytesIO()
    with wave.open(out, "wb") as writer:
        writer.setparams((1, 2, 16000, 0, "NONE", ""))
    assert code_of(out.getvalue()) == "empty_audio"


@pytest.mark.parametrize(
    "data",
    [
        b"no sound at all",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"fLaC" + bytes(200),
        b"OggS" + bytes(200),
        b"ID3" + bytes(200),
        b"\xff\xfb" + bytes(200),
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"\x00\x00\x00\x18ftypisom" + bytes(200),
        b"\x1aE\xdf\xa3" + bytes(200),
    ],
)
def test_no_sound(data: bytes) -> None:
    assert code_of(data) == "invalid_audio"


def test_a_film_without_sound() -> None:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as target:
        stream = target.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(5):
            target.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        target.mux(stream.encode(None))
    with pytest.raises(ApiError, match="no audio stream"):
        decode_audio(out.getvalue(), max_seconds=60)


def test_playlists_are_never_opened() -> None:
    for data in (
        b"#EXTM3U\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"v=0\r\n",
    ):
        assert sniff(data) is None
        assert code_of(data) == "invalid_audio"


def test_damage_in_the_middle_never_escapes_as_another_error() -> None:
    numbers = np.random.default_rng(0)
    for container, codec, rate, layout in KINDS:
        data = bytearray(speech(container, codec, rate, layout))
        for share in (200, 20):
            for at in numbers.integers(50, len(data), len(data) // share):
                data[at] = numbers.integers(256)
            try:
                samples = decode_audio(bytes(data), max_seconds=60)
            except ApiError as error:
                assert error.code in ("invalid_audio", "empty_audio", "audio_too_short", "audio_too_long")
            else:
                assert np.isfinite(samples).all()


@pytest.mark.parametrize("container", ["flac", "ogg", "adts"])
def test_too_long_by_the_header_or_by_what_is_decoded(container: str) -> None:
    codec = {"flac": "flac", "ogg": "libopus", "adts": "aac"}[container]
    assert code_of(speech(container, codec, 48000), max_seconds=5) == "audio_too_long"


def test_too_short() -> None:
    assert code_of(sound(np.zeros(800, np.float32))) == "audio_too_short"
    assert len(decode_audio(sound(np.zeros(1600, np.float32)), max_seconds=60)) == 1600


def test_a_wav_of_unknown_length_is_taken_as_it_is() -> None:
    data = bytearray(sound(np.sin(np.arange(16000) / 10).astype(np.float32)))
    at = data.index(b"data")
    data[at + 4 : at + 8] = b"\xff\xff\xff\xff"
    assert math.isclose(len(decode_audio(bytes(data), max_seconds=60)), 16000, abs_tol=16)
