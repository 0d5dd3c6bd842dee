"""A profile: which models one kind of machine serves, and how each is cut to fit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Needs(BaseModel):
    """The machine that a profile is made for."""

    model_config = ConfigDict(extra="forbid")
    gpus: int = Field(default=0, ge=0, description="GPUs; 0 = CPU only.")
    gpu_memory_bytes: int = Field(default=0, ge=0, description="Memory of each GPU, bytes.")
    memory_bytes: int = Field(default=0, ge=0, description="Host memory, bytes.")
    nodes: str = Field(
        default="", description="Nodes that `hearth plan` takes, NODESxGPUSxKIND; '' = it is told them."
    )


class ProfileModel(BaseModel):
    """One model of a profile; None leaves the catalog entry's own value."""

    model_config = ConfigDict(extra="forbid")
    id: str = Field(description="Serving name in the catalog.")
    tier: Literal["resident", "standby"] = Field(
        default="resident", description="'standby' = asleep until a request comes."
    )
    pinned: bool = Field(default=False, description="Once awake, never makes room for another.")
    replicas: int = Field(default=1, ge=1, description="Fewest replicas.")
    max_replicas: int | None = Field(
        default=None, ge=1, description="Most replicas; None = as many as fewest."
    )
    ranks: int = Field(
        default=1, ge=1, description="Processes that share one replica on a CPU (vLLM's tensor parallelism)."
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of one replica, of each rank.")
    memory_bytes: int | None = Field(default=None, ge=0, description="Memory budget of one replica, bytes.")
    context_length: int | None = Field(default=None, ge=1, description="Tokens.")
    concurrency: int = Field(
        default=1, ge=1, description="`hearth plan`: requests of the whole context held at once."
    )
    kv_dtype: Literal["auto", "bf16", "fp8"] = Field(
        default="auto", description="`hearth plan`: the KV cache's format; 'auto' = the architecture's own."
    )
    eplb: bool | None = Field(
        default=None, description="`hearth plan`: expert load balancing; None = where it is known to help."
    )
    priority: int = Field(default=0, description="Higher: placed and woken first, put to sleep last.")
    max_batch: int = Field(default=8, ge=1)
    max_wait_ms: float = Field(default=5.0, ge=0, description="Milliseconds.")
    max_queue: int = Field(default=256, ge=1)
    options: dict[str, Any] = Field(default_factory=dict, description="Engine options, over the catalog's.")


class Profile(BaseModel):
    """`models/profiles/<name>.toml`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    title: str = ""
    plan_only: bool = Field(
        default=False,
        description="True: `hearth plan` lays it out; `hearth serve` never chooses it, since it is made for "
        "several machines.",
    )
    by_name: bool = Field(
        default=False, description="True: taken where it is named, never chosen by the machine's size."
    )
    needs: Needs = Field(default_factory=Needs)
    models: list[ProfileModel] = Field(min_length=1)
