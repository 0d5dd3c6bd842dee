"""The requests and answers of the API, for its OpenAPI page.

They document; nothing is checked against them. A request goes to its runner as it came, so a field that
only an engine knows works too.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.routes import ReplicaState
from engine.runners.spec import Category


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


_MODEL = Field(description="Name of a served model; GET /v1/models lists them.")


class ErrorBody(_Open):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """Every failure of every endpoint."""

    error: ErrorBody


class ChatMessage(_Open):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = Field(
        default=None, description="Text, or parts: `text`, and for vision and detection models `image_url`."
    )


class ChatCompletionRequest(_Open):
    """OpenAI's chat completion request.

    For models of the categories chat, code (with the capability `chat`), vision and detection.
    """

    model: str = _MODEL
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


class Usage(_Open):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None


class ChatCompletion(_Open):
    """With `stream`: server-sent events of `chat.completion.chunk` objects, ended by `data: [DONE]`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


class CompletionRequest(_Open):
    """OpenAI's completion request; models of the categories chat and code."""

    model: str = _MODEL
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = Field(
        default=None, description="Text after the hole (fill in the middle); models with a template only."
    )
    max_tokens: int | None = None
    temperature: float | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None


class Completion(_Open):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


class EmbeddingRequest(_Open):
    model: str = _MODEL
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ImageRequest(_Open):
    model: str = _MODEL
    prompt: str
    n: int | None = Field(default=None, description="Pictures, 1 to 10.")
    size: str | None = Field(default=None, description="WIDTHxHEIGHT in pixels, or `auto`.")
    response_format: Literal["b64_json"] | None = None
    seed: int | None = Field(default=None, description="The same seed gives the same picture.")
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None


class Images(_Open):
    created: int
    data: list[dict[str, Any]]


class TranscriptionForm(_Open):
    model: str = _MODEL
    file: bytes = Field(json_schema_extra={"format": "binary"}, description="An audio or video file.")
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    temperature: float | None = None
    timestamp_granularities: list[Literal["word", "segment"]] | None = None
    stream: bool | None = None


class Transcription(_Open):
    """For `json` and `verbose_json`; the other formats are plain text."""

    text: str


class DetectionRequest(_Open):
    """Objects to be found in one picture."""

    model: str = _MODEL
    image: str = Field(description="The picture: an http(s) URL or a data URL.")
    confidence: float | None = Field(default=None, ge=0, le=1, description="Least confidence of a box.")
    iou: float | None = Field(
        default=None, ge=0, le=1, description="Boxes of one class that overlap more are merged."
    )
    max_detections: int | None = Field(default=None, ge=1, description="Most boxes.")
    classes: list[str | int] | None = Field(default=None, description="Labels or class numbers to look for.")


class DetectionForm(_Open):
    """The same as a form, the picture as a file."""

    model: str = _MODEL
    image: bytes = Field(json_schema_extra={"format": "binary"})
    confidence: float | None = None
    iou: float | None = None
    max_detections: int | None = None
    classes: list[str] | None = None


class Box(BaseModel):
    """Corners in pixels of the given picture, from its upper left."""

    x1: float
    y1: float
    x2: float
    y2: float


class DetectedObject(BaseModel):
    label: str
    class_id: int
    confidence: float
    box: Box


class ImageSize(BaseModel):
    width: int
    height: int


class Detections(BaseModel):
    """Highest confidence first."""

    object: Literal["list"]
    model: str
    data: list[DetectedObject]
    image: ImageSize


class LocalAiDetectionRequest(_Open):
    model: str = _MODEL
    image: str = Field(description="URL, data URL or base64.")
    threshold: float | None = None


class LocalAiDetection(BaseModel):
    """Upper left corner and size, pixels."""

    x: float
    y: float
    width: float
    height: float
    confidence: float
    class_name: str


class LocalAiDetections(BaseModel):
    detections: list[LocalAiDetection]


class Loading(BaseModel):
    state: ReplicaState
    reason: str = ""
    elapsed_s: float | None = Field(
        default=None, description="How long it has been on its way, seconds; null when it is not, or unknown."
    )
    expected_s: float | None = Field(default=None, description="Roughly how long until ready, seconds.")


class ModelCard(BaseModel):
    """OpenAI's model object, and what this server adds."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    aliases: list[str]
    category: Category
    state: ReplicaState
    context_length: int | None
    capabilities: list[str]
    loading: Loading | None = Field(default=None, description="Only while it is not ready.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    ready: bool
    models: int = Field(description="Models served.")
