"""Sound as clients send it: bytes of any usual container into 16 kHz mono samples, bounded and checked.

The container is told from its first bytes and only that demuxer is opened: FFmpeg's own guessing knows
playlist formats that make it read other files and addresses.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.errors import ApiError, bad_request

SAMPLE_RATE: Final = 16000
MIN_SECONDS: Final = 0.1  # OpenAI's own lower bound
FORMATS: Final = "flac, mp3, mp4, mpeg, mpga, m4a, ogg, wav or webm"

#: Missing more than this share of the sound that the header announces is called truncated.
_MISSING: Final = 0.1
#: And at least this many seconds: encoders pad and cut a little at both ends.
_SLACK_S: Final = 0.5

Samples = npt.NDArray[np.float32]


def decode_audio(data: bytes, *, max_seconds: float, param: str = "file") -> Samples:
    """The first audio stream of a file as float32 samples (n,) in -1..1, 16 kHz, mono. CPU work.

    Args:
        data: the file's bytes.
        max_seconds: longest sound; decoding stops as soon as it is passed.
        param: request field named in errors.

    Raises:
        ApiError: 400 with code ``empty_audio``, ``invalid_audio``, ``audio_too_long`` or ``audio_too_short``.
    """
    import av

    if not data:
        raise bad_request("The audio file is empty (0 bytes).", param=param, code="empty_audio")
    container_format = sniff(data)
    if container_format is None:
        raise _invalid(f"The file is in no audio format known here. Send {FORMATS}.", param)
    if (container_format == "wav" and _wav_is_cut(data)) or (container_format == "ogg" and _ogg_is_cut(data)):
        raise _invalid(
            "The audio file is truncated: it ends before its last block does. Send it in whole.", param
        )
    try:
        samples = _decode(data, container_format, max_seconds, param)
    except av.error.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise _invalid(
            f"The audio file is damaged or truncated ({reason}). Send it again in whole.", param
        ) from error
    if not len(samples):
        raise bad_request("The audio file holds no sound.", param=param, code="empty_audio")
    if len(samples) < MIN_SECONDS * SAMPLE_RATE:
        seconds = len(samples) / SAMPLE_RATE
        raise bad_request(
            f"The audio lasts {seconds:.3f} s; the shortest that can be transcribed is {MIN_SECONDS} s.",
            param=param,
            code="audio_too_short",
        )
    return samples


def sniff(data: bytes) -> str | None:
    """FFmpeg's demuxer name for the container that the first bytes show, or None."""
    head = data[:16]
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "wav"
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mp4"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if len(head) > 1 and head[0] == 0xFF:
        if head[1] & 0xF6 == 0xF0:
            return "aac"
        # MPEG audio frame sync, any version, layer 1 to 3.
        if head[1] & 0xE0 == 0xE0 and head[1] & 0x06:
            return "mp3"
    return None


_MAGIC: Final = (
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"\x1aE\xdf\xa3", "matroska"),
    (b"ID3", "mp3"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"#!AMR", "amr"),
)


def _decode(data: bytes, container_format: str, max_seconds: float, param: str) -> Samples:
    import av

    with av.open(io.BytesIO(data), mode="r", format=container_format, metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise _invalid("The file has no audio stream.", param)
        stream = container.streams.audio[0]
        stream.thread_type = "NONE"  # the thread pool bounds the CPU that decoding takes
        announced = _announced_seconds(container, stream)
        if announced is not None and announced > max_seconds:
            raise _too_long(announced, max_seconds, param)

        resample = _Resampler()
        blocks: list[npt.NDArray[np.int16]] = []
        count, bad, good = 0, 0, 0
        last_error: Exception | None = None
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError as error:
                # One bad packet is common (junk between an MP3's tags and its frames); many are damage.
                bad, last_error = bad + 1, error
                continue
            good += bool(frames)
            for frame in frames:
                for block in resample(frame):
                    blocks.append(block)
                    count += len(block)
            if count > max_seconds * SAMPLE_RATE:
                raise _too_long(None, max_seconds, param)
        blocks.extend(resample.rest())

    if not good and last_error is not None:
        raise last_error
    samples = np.concatenate(blocks).astype(np.float32) / 32768.0 if blocks else np.zeros(0, np.float32)
    seconds = len(samples) / SAMPLE_RATE
    missing = (announced or 0.0) - seconds
    if announced is not None and missing > max(_SLACK_S, _MISSING * announced):
        raise _invalid(
            f"The audio file is damaged or truncated: it announces {announced:.1f} s of sound, and only "
            f"{seconds:.1f} s can be decoded. Send it again in whole.",
            param,
        )
    if bad > _MISSING * (bad + good) and bad > 1:
        raise _invalid(
            f"The audio file is damaged: {bad} of its {bad + good} packets cannot be decoded.", param
        )
    return samples


class _Resampler:
    """Frames of any shape, also one that changes midway, into mono blocks of 16-bit samples at 16 kHz."""

    def __init__(self) -> None:
        self._inner: Any = None
        self._shape: tuple[str, str, int] | None = None

    def __call__(self, frame: Any) -> Iterator[npt.NDArray[np.int16]]:
        import av

        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape != self._shape:
            yield from self.rest()
            self._inner = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
            self._shape = shape
        frame.pts = None  # broken time stamps must not insert or drop samples
        for resampled in self._inner.resample(frame):
            yield resampled.to_ndarray()[0]

    def rest(self) -> Iterator[npt.NDArray[np.int16]]:
        """What the filter still holds back."""
        if self._inner is not None:
            for resampled in self._inner.resample(None):
                yield resampled.to_ndarray()[0]


def _announced_seconds(container: Any, stream: Any) -> float | None:
    """The stream's duration by its header; None when it tells none (streamed WebM, raw ADTS)."""
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / 1_000_000
    else:
        return None
    return seconds if seconds > 0 else None


def _wav_is_cut(data: bytes) -> bool:
    """Whether a WAV's sound is much shorter than its data chunk says (FFmpeg is silent about it).

    Sizes of 0 and 2**32 - 1 are what programs write that do not know the length beforehand.
    """
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return size not in (0, 0xFFFFFFFF) and len(data) - at - 8 < (1 - _MISSING) * size
        at += 8 + size + size % 2
    return False


def _ogg_is_cut(data: bytes) -> bool:
    """Whether an Ogg file ends inside a page (RFC 3533: 27 bytes of header, the table of sizes, the body)."""
    at = data.rfind(b"OggS")
    if len(data) < at + 27:
        return True
    sizes = data[at + 27 : at + 27 + data[at + 26]]
    return len(data) < at + 27 + data[at + 26] + sum(sizes)


def _invalid(message: str, param: str) -> ApiError:
    return bad_request(message, param=param, code="invalid_audio")


def _too_long(seconds: float | None, most: float, param: str) -> ApiError:
    lasts = f"lasts {seconds:.0f} s" if seconds is not None else "is too long"
    return bad_request(
        f"The audio {lasts}; the most is {most:.0f} s a request. Cut it into parts.",
        param=param,
        code="audio_too_long",
    )
