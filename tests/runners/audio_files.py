"""The speech sample in other containers, and other sounds, made by PyAV."""

from __future__ import annotations

import asyncio
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "jfk.flac"
SAID = re.findall(
    r"\w+",
    "and so my fellow americans ask not what your country can do for you, "
    "ask what you can do for your country",
)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


async def until(true: Callable[[], bool], seconds: float = 5) -> None:
    """Waits for something that another thread brings about."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - the threads under test know no asyncio event
            await asyncio.sleep(0.002)


@functools.cache
def speech(container: str, codec: str, rate: int = 16000, layout: str = "mono") -> bytes:
    """The sample encoded anew."""
    with av.open(str(SAMPLE)) as source:
        return _encoded(list(source.decode(audio=0)), container, codec, rate, layout)


def sound(samples: np.ndarray[Any, Any], container: str = "wav", codec: str = "pcm_s16le") -> bytes:
    """Mono float samples at 16 kHz as a file."""
    frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
    frame.sample_rate = 16000
    return _encoded([frame], container, codec, 16000, "mono")


def _encoded(frames: list[Any], container: str, codec: str, rate: int, layout: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as target:
        stream: Any = target.add_stream(codec, rate=rate)
        stream.layout = layout
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for frame in [*frames, None]:
            for resampled in resampler.resample(frame):
                target.mux(stream.encode(resampled))
        target.mux(stream.encode(None))
    return out.getvalue()
