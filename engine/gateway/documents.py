"""The OpenAPI description of the forwarded endpoints, made from the schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from engine.gateway import schemas

_REFERENCE = "#/components/schemas/{model}"


class Document(NamedTuple):
    """What is written about one forwarded endpoint."""

    tag: str
    summary: str
    takes: dict[str, type[BaseModel]]
    gives: type[BaseModel]
    streams: bool = False


_JSON, _FORM = "application/json", "multipart/form-data"

DOCUMENTS: dict[str, Document] = {
    "/v1/chat/completions": Document(
        "chat",
        "Chat, with pictures for vision and detection models",
        {_JSON: schemas.ChatCompletionRequest},
        schemas.ChatCompletion,
        streams=True,
    ),
    "/v1/completions": Document(
        "code",
        "Text and code completion, fill in the middle",
        {_JSON: schemas.CompletionRequest},
        schemas.Completion,
        streams=True,
    ),
    "/v1/embeddings": Document(
        "embedding", "Embeddings", {_JSON: schemas.EmbeddingRequest}, schemas.Embeddings
    ),
    "/v1/images/generations": Document(
        "image", "Pictures from text", {_JSON: schemas.ImageRequest}, schemas.Images
    ),
    "/v1/audio/transcriptions": Document(
        "audio",
        "Speech to text",
        {_FORM: schemas.TranscriptionForm},
        schemas.Transcription,
        streams=True,
    ),
    "/v1/audio/translations": Document(
        "audio", "Speech to English text", {_FORM: schemas.TranscriptionForm}, schemas.Transcription
    ),
    "/v1/detections": Document(
        "detection",
        "Objects in a picture",
        {_JSON: schemas.DetectionRequest, _FORM: schemas.DetectionForm},
        schemas.Detections,
    ),
    "/v1/detection": Document(
        "detection",
        "Objects in a picture, in LocalAI's shape",
        {_JSON: schemas.LocalAiDetectionRequest, _FORM: schemas.DetectionForm},
        schemas.LocalAiDetections,
    ),
}


def add_forwarded(document: dict[str, Any]) -> dict[str, Any]:
    """Adds the forwarded endpoints, their schemas and the bearer key to an OpenAPI document; returns it."""
    models: dict[str, type[BaseModel]] = {schemas.Error.__name__: schemas.Error}
    for described in DOCUMENTS.values():
        models |= {model.__name__: model for model in (*described.takes.values(), described.gives)}
    _, definitions = models_json_schema(
        [(model, "validation") for model in models.values()], ref_template=_REFERENCE
    )
    components = document.setdefault("components", {})
    components["schemas"] = {**definitions["$defs"], **components.get("schemas", {})}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, described in DOCUMENTS.items():
        document["paths"][path] = {"post": _operation(path, described)}
    for path, methods in document["paths"].items():
        if path.startswith(("/v1/", "/admin/")):
            for operation in methods.values():
                operation["security"] = [{"key": []}]
    return document


def _operation(path: str, described: Document) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": _reference(described.gives)}}
    if described.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "tags": [described.tag],
        "summary": described.summary,
        "operationId": path.removeprefix("/v1/").replace("/", "_"),
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": _reference(model)} for kind, model in described.takes.items()},
        },
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "4XX": _failure("The request is at fault."),
            "5XX": _failure("The server is at fault, or the model is not ready (503 with retry-after)."),
        },
    }


def _failure(description: str) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": _reference(schemas.Error)}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
