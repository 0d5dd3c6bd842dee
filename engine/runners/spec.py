"""What a runner is told at its start, and the contract every runner keeps.

The contract (the scheduler relies on it, whatever library is inside):

- started as ``python -m engine.runners.<module> --spec FILE``, FILE being a :class:`RunnerSpec` as JSON;
- serves OpenAI-format HTTP on the Unix socket ``spec.socket`` (mode 0600), bound only once the model is
  loaded or answering ``GET /health`` with 503 until it is; 200 means "loaded", not yet "warm";
- ``GET /metrics`` is Prometheus text;
- accepts ``spec.model`` and each of ``spec.aliases`` as the request's ``model``, since the gateway
  forwards bodies untouched;
- where ``spec.can_sleep``: ``POST /sleep?level=1`` gives the device memory back (200; 409 while a request
  is in hand, which changes nothing), ``POST /wake_up`` takes it again, ``GET /is_sleeping`` is
  ``{"is_sleeping": bool}``; asleep, ``GET /health`` stays 200 and a request is answered 503 `model_asleep`;
- SIGTERM: finish what is running (at most ``spec.drain_s`` seconds), then exit 0;
- starts no process outside its own process group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Category = Literal["chat", "code", "vision", "image", "audio", "embedding", "detection"]
EngineKind = Literal["vllm", "diffusers", "faster-whisper", "sentence-transformers", "ultralytics"]

#: The module that serves each engine kind.
RUNNER_MODULES: dict[EngineKind, str] = {
    "vllm": "engine.runners.vllm_server",
    "diffusers": "engine.runners.image",
    "faster-whisper": "engine.runners.audio",
    "sentence-transformers": "engine.runners.embedding",
    "ultralytics": "engine.runners.detection",
}


class RunnerSpec(BaseModel):
    """Everything one runner process needs to know."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="Serving name.")
    aliases: list[str] = Field(default_factory=list, description="Further serving names.")
    category: Category
    engine: EngineKind
    capabilities: list[str] = Field(
        default_factory=list, description="What the model can do, e.g. 'tools', 'translate'."
    )
    model_dir: Path = Field(
        description="Folder (or file) with the weights, in the layout that the engine loads."
    )
    socket: Path = Field(description="Unix socket to serve on.")
    device: str = Field(default="cpu:0", description="Device name, 'cpu:0' or 'cuda:0,1'.")
    threads: int = Field(default=1, ge=1, description="CPU threads for the model's arithmetic.")
    memory_bytes: int = Field(default=0, ge=0, description="Memory budget in bytes; 0 = no budget given.")
    context_length: int | None = Field(default=None, description="Longest input plus output, in tokens.")
    max_batch: int = Field(default=8, ge=1, description="Most requests (or items) that run together.")
    max_wait_ms: float = Field(
        default=5.0, ge=0, description="Longest a request waits for company, milliseconds."
    )
    max_queue: int = Field(
        default=256, ge=1, description="Most requests that wait; one more is answered 429."
    )
    drain_s: float = Field(default=30.0, ge=0, description="Longest drain after SIGTERM, seconds.")
    can_sleep: bool = Field(default=False, description="Whether it is put to sleep and woken (tier standby).")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of this engine (catalog 'options')."
    )
