"""The audio runner: Whisper through faster-whisper, as OpenAI's transcription and translation endpoints.

Sound without speech is taken out before the model sees it (option ``vad``): a silent clip is an empty
transcript instead of an invented "you". Each window of 30 s is decoded on its own (``carry_context`` is off),
which lets windows of different requests share a batch and keeps one bad window from spoiling the next.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Hashable, Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import ApiError, bad_request
from engine.runners import audio_formats as formats
from engine.runners.audio_decode import SAMPLE_RATE, Samples, decode_audio
from engine.runners.audio_request import Ask, read_ask
from engine.runners.audio_slots import OneAtATime, Slots, current_ticket
from engine.runners.audio_windows import Call, SharedModel, Window, run_calls
from engine.runners.base import Runner, endpoint, serve
from engine.runners.batching import Batcher, Work
from engine.runners.endpoints import EventStream, event
from engine.runners.instruments import Instruments
from engine.runners.memory import give_back
from engine.runners.spec import RunnerSpec

_MAX_FIELDS: Final = 64
#: Names of the capability, short and as the catalog writes endpoints.
_TRANSLATES: Final = frozenset({"translate", "audio.translations"})


class Options(BaseModel):
    """``spec.options`` of this engine."""

    model_config = ConfigDict(extra="forbid")
    beam_size: int = Field(default=5, ge=1, description="Beams at temperature 0.")
    compute_type: str | None = Field(default=None, description="CTranslate2's; None: by device.")
    max_seconds: float = Field(default=1500, gt=0, description="Longest sound of a request, seconds.")
    max_bytes: int = Field(default=25 * 1024 * 1024, ge=1, description="Largest file, bytes.")
    vad: bool = Field(default=True, description="Take out what holds no speech.")
    carry_context: bool = Field(default=False, description="Prompt each window with the text before it.")


class WhisperEngine:
    """faster-whisper behind OpenAI's audio endpoints."""

    def __init__(self, spec: RunnerSpec) -> None:
        self.spec = spec
        self.options = Options.model_validate(spec.options)
        self.model: Any = None  # a faster_whisper.WhisperModel
        self._whisper: Any = None  # its ctranslate2.models.Whisper
        self._calls: Batcher[Call, Any]
        self._slots: Slots
        self._runner: Runner

    def load(self) -> None:
        """Loads the model and the voice detector.

        Raises:
            FileNotFoundError: the folder lacks a file.
            RuntimeError: CTranslate2 cannot load it.
        """
        folder = Path(self.spec.model_dir)
        for name in ("model.bin", "config.json", "tokenizer.json"):
            # Checked here: faster-whisper would look for what is missing on a hub.
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}. Prepare the model again.")
        from faster_whisper import WhisperModel
        from faster_whisper.vad import get_vad_model

        logging.getLogger("faster_whisper").setLevel(logging.WARNING)

        kind, _, numbers = self.spec.device.partition(":")
        compute_type = self.options.compute_type or ("float16" if kind == "cuda" else "int8")
        self.take(
            WhisperModel(
                str(folder),
                device=kind,
                device_index=list(range(len(numbers.split(",")))) if kind == "cuda" else 0,
                compute_type=compute_type,
                cpu_threads=self.spec.threads,
                local_files_only=True,
            )
        )
        if self.options.vad:
            get_vad_model()

    def sleep(self) -> None:
        """Gives the model's memory back; the tokenizer and the voice detector (2 MB) stay.

        On a GPU the weights wait in host memory; on a CPU CTranslate2 reads its file again.
        """
        self._whisper.unload_model(to_cpu=self.spec.device.startswith("cuda"))
        give_back()

    def wake(self) -> None:
        """Takes the memory again.

        Raises:
            RuntimeError: the file has gone, or the device has not enough memory.
        """
        self._whisper.load_model()

    def take(self, model: Any) -> None:
        """Makes ``model`` (a ``WhisperModel``) gather its calls with those of other clips."""
        # Text of a prompt that looks like a control token ("<|endoftext|>") must stay text.
        model.hf_tokenizer.encode_special_tokens = True
        # The spectrum of a long clip takes many times its own memory for a moment: not for several at once.
        model.feature_extractor = OneAtATime(model.feature_extractor)
        self._whisper = model.model
        model.model = SharedModel(model.model, self._gather)
        model.encode = lambda features: Window(features)
        self.model = model

    def routes(self, runner: Runner) -> list[Route]:
        self._runner = runner
        most = self.spec.max_batch
        self._slots = Slots(
            most=most, max_queue=self.spec.max_queue, name=self.spec.model, metrics=runner.metrics
        )
        self._calls = runner.batcher(
            lambda key, works: self._run(key, works), max_queue=most, observer=_Batches(runner.metrics)
        )

        # A clip whose client has gone runs on to its next call of the model.
        runner.sleeper.stays_awake_while(lambda: self._slots.busy)

        async def transcriptions(request: Request) -> Response:
            return await self._answer(request, "transcribe")

        async def translations(request: Request) -> Response:
            return await self._answer(request, "translate")

        return [
            Route("/v1/audio/transcriptions", endpoint(transcriptions), methods=["POST"]),
            Route("/v1/audio/translations", endpoint(translations), methods=["POST"]),
        ]

    @property
    def can_translate(self) -> bool:
        """Multilingual, and said to translate where capabilities are listed (turbo models cannot)."""
        listed = self.spec.capabilities
        return bool(self._whisper.is_multilingual) and (not listed or not _TRANSLATES.isdisjoint(listed))

    async def _answer(self, request: Request, task: formats.Task) -> Response:
        kind = request.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/form-data"):
            raise bad_request(
                f"This endpoint takes multipart/form-data with the sound in the field 'file', not "
                f"{kind or 'a body without content-type'!r}.",
                code="invalid_form",
            )
        async with request.form(max_files=4, max_fields=_MAX_FIELDS) as form:
            fields: dict[str, list[str]] = {}
            for name, value in form.multi_items():
                if isinstance(value, str):
                    fields.setdefault(name, []).append(value)
            self._runner.check_model(next(iter(fields.get("model", [])), None))
            ask = read_ask(
                fields,
                task=task,
                model=self.spec.model,
                languages=self.model.supported_languages,
                can_translate=self.can_translate,
            )
            data = await self._file(form.get("file"))
        samples = await self._runner.offload(_decode, data, self.options.max_seconds)
        duration = len(samples) / SAMPLE_RATE
        if ask.stream:
            return EventStream(self._events(ask, samples, duration))
        transcript = await self._transcript(ask, samples, duration)
        content = formats.body(transcript, ask.format, ask.granularities)
        return Response(content, headers={"content-type": formats.CONTENT_TYPES[ask.format]})

    async def _file(self, sent: UploadFile | str | None) -> bytes:
        if sent is None:
            raise bad_request("Missing required field 'file'.", param="file", code="missing_field")
        if isinstance(sent, str):
            raise bad_request(
                "'file' must be a file part (with a file name), not text.", param="file", code="invalid_value"
            )
        most = self.options.max_bytes
        if (sent.size or 0) > most:
            raise ApiError(
                413,
                f"The audio file has {sent.size} bytes; the most is {most}. Compress or cut it.",
                param="file",
                code="audio_too_large",
            )
        return await sent.read()

    async def _transcript(self, ask: Ask, samples: Samples, duration: float) -> formats.Transcript:
        language, segments = ask.language or "en", []
        async for thing in self._slots.stream(lambda: self._transcribe(ask, samples)):
            if isinstance(thing, str):
                language = thing
            else:
                segments.append(thing)
        return formats.Transcript(ask.task, language, duration, segments)

    async def _events(self, ask: Ask, samples: Samples, duration: float) -> AsyncIterator[bytes]:
        segments: list[formats.Segment] = []
        stream = self._slots.stream(lambda: self._transcribe(ask, samples))
        try:
            async for thing in stream:
                if isinstance(thing, formats.Segment):
                    # The deltas put together are the whole text: only its first blank goes.
                    text = thing.text if segments else thing.text.lstrip()
                    segments.append(thing)
                    yield event(formats.delta_event(text))
        finally:
            await stream.aclose()
        yield event(
            formats.done_event(formats.Transcript(ask.task, ask.language or "en", duration, segments))
        )

    def _transcribe(self, ask: Ask, samples: Samples) -> Iterator[str | formats.Segment]:
        """The language of the text, then its segments as they are found. Runs in a slot's thread."""
        segments, info = self.model.transcribe(
            samples,
            language=ask.language,
            task=ask.task,
            beam_size=self.options.beam_size,
            temperature=list(ask.temperatures),
            initial_prompt=ask.prompt,
            word_timestamps=ask.word_times,
            condition_on_previous_text=self.options.carry_context,
            vad_filter=self.options.vad,
        )
        yield "en" if ask.task == "translate" else str(info.language)
        for segment in segments:
            yield _segment(segment)

    def _gather(self, key: Hashable, call: Call) -> Any:
        return current_ticket().wait_for(self._calls.submit(key, call))

    def _run(self, key: Any, works: list[Work[Call]]) -> list[Any]:
        return run_calls(self._whisper, key, works)


class _Batches:
    """Tells the metrics of the batches; the queue that clients wait in is that of the slots."""

    def __init__(self, metrics: Instruments) -> None:
        self._metrics = metrics

    def queued(self, waiting: int) -> None:
        """Windows between two batches: no queue of requests."""

    def ran(self, size: int, waits_s: Any, seconds: float) -> None:
        self._metrics.batch_size.observe(size)
        self._metrics.batch_seconds.observe(seconds)


def _decode(data: bytes, max_seconds: float) -> Samples:
    return decode_audio(data, max_seconds=max_seconds)


def _segment(found: Any) -> formats.Segment:
    """faster-whisper's segment as plain numbers."""
    words = [
        formats.Word(word.word, round(float(word.start), 3), round(float(word.end), 3))
        for word in found.words or []
    ]
    return formats.Segment(
        start=round(float(found.start), 3),
        end=round(float(found.end), 3),
        text=found.text,
        seek=int(found.seek),
        tokens=[int(token) for token in found.tokens],
        temperature=float(found.temperature or 0.0),
        avg_logprob=float(found.avg_logprob),
        compression_ratio=float(found.compression_ratio),
        no_speech_prob=float(found.no_speech_prob),
        words=words,
    )


if __name__ == "__main__":
    serve(WhisperEngine)
