"""What is to be served: the profile's models as the configuration changes them, with their entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from engine.config import Config, ModelConfig
from engine.errors import nearest
from engine.planner.ownership import family
from models.catalog import merge_options
from models.entry import LocalSource, ModelEntry
from models.profile import Profile, ProfileModel


class PlanError(Exception):
    """The models cannot be placed; the message names the thing, the reason and the next step."""


class Entries(Protocol):
    """The catalog, as far as planning needs it."""

    @property
    def entries(self) -> Mapping[str, ModelEntry]: ...


@dataclass(frozen=True)
class Standing:
    """How a model keeps its place in memory: the same for all its replicas, and no reason to restart one."""

    tier: Literal["resident", "standby"] = "resident"
    #: Once awake, never put to sleep for another model.
    pinned: bool = False
    priority: int = 0
    min_replicas: int = 1
    max_replicas: int = 1
    #: Of owned replicas: requests go to shared ones while these are full or not ready.
    spill_over: bool = False


@dataclass(frozen=True)
class Wish:
    """One model to serve: configuration over profile over catalog."""

    entry: ModelEntry
    model: ProfileModel
    own: ModelConfig
    standing: Standing
    #: The tenant whose replicas these are; None = shared.
    owner: str | None = None
    #: They stand on the owner's own GPUs.
    own_gpus: bool = False

    @property
    def family(self) -> str:
        """What its replicas are named by, less their number."""
        return family(self.id, self.owner)

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def budget(self) -> int | None:
        """Memory of one replica, bytes, where a person fixed it in the configuration or the profile."""
        own = self.own.memory_bytes
        return self.model.memory_bytes if own is None else own

    @property
    def context(self) -> int | None:
        """Context asked for, tokens; None = the entry's own."""
        return self.own.context_length or self.model.context_length

    @property
    def threads(self) -> int:
        return self.own.threads or self.model.threads

    @property
    def max_batch(self) -> int:
        return self.own.max_batch or self.model.max_batch

    @property
    def max_queue(self) -> int:
        return self.own.max_queue or self.model.max_queue

    @property
    def max_wait_ms(self) -> float:
        own = self.own.max_wait_ms
        return self.model.max_wait_ms if own is None else own

    @property
    def asked_options(self) -> dict[str, Any]:
        """Engine options that the profile and the configuration put over the entry's."""
        return merge_options(self.model.options, self.own.options)

    @property
    def effective(self) -> ProfileModel:
        """The profile's model as the configuration changes it."""
        return self.model.model_copy(
            update={
                "tier": self.standing.tier,
                "pinned": self.standing.pinned,
                "priority": self.standing.priority,
                "replicas": self.standing.min_replicas,
                "max_replicas": self.standing.max_replicas,
                "threads": self.threads,
                "memory_bytes": self.budget,
                "context_length": self.context,
                "max_batch": self.max_batch,
                "max_wait_ms": self.max_wait_ms,
                "max_queue": self.max_queue,
                "options": self.asked_options,
            }
        )

    @property
    def options(self) -> dict[str, Any]:
        return merge_options(self.entry.options, self.asked_options)


def wishes_of(config: Config, profile: Profile, catalog: Entries) -> list[Wish]:
    """The profile's models and those that the configuration adds, without those it disables; all shared.

    Raises:
        PlanError: a model is unknown, its bounds contradict each other, or none is left (and no tenant has
            any of its own).
    """
    listed = [*profile.models]
    ids = {model.id for model in listed}
    listed += [ProfileModel(id=name) for name in config.models if name not in ids]
    found = []
    for model in listed:
        own = config.models.get(model.id) or ModelConfig()
        entry = entry_of(catalog, model.id)
        if own.enabled:
            found.append(Wish(with_own_weights(entry, own), model, own, _standing(model, own)))
    if not found and not config.dedicated:
        raise PlanError(
            f"profile '{profile.name}' has no model left to serve: each is disabled in [models]. Enable one."
        )
    return found


def entry_of(catalog: Entries, id: str, where: str = "") -> ModelEntry:
    """The model's entry.

    Raises:
        PlanError: there is none; ``where`` is put before the message.
    """
    entry = catalog.entries.get(id)
    if entry is None:
        close = nearest(id, catalog.entries)
        known = ", ".join(sorted(catalog.entries))
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {known}."
        raise PlanError(f"{where}model '{id}' is not in the catalog (models/catalog/). {hint}")
    return entry


def with_own_weights(entry: ModelEntry, own: ModelConfig) -> ModelEntry:
    """The entry with the weights that the configuration names before its own sources."""
    if own.path is None:
        return entry
    # Weights of one's own are prepared apart from those that other entries share under the same key.
    local = LocalSource(kind="local", path=str(own.path.expanduser().resolve()))
    return entry.model_copy(update={"sources": [local, *entry.sources], "weights_key": f"{entry.id}-local"})


def _standing(model: ProfileModel, own: ModelConfig) -> Standing:
    if own.min_replicas and own.max_replicas and own.min_replicas > own.max_replicas:
        raise PlanError(
            f"{model.id}: min_replicas = {own.min_replicas} is more than max_replicas = {own.max_replicas}. "
            f"Raise or leave out [models.{model.id}] max_replicas."
        )
    fewest = own.min_replicas or own.replicas or model.replicas
    most = own.max_replicas or own.replicas or max(model.max_replicas or 0, model.replicas)
    # What the configuration says of one bound moves the profile's other bound along.
    if own.max_replicas and not own.min_replicas:
        fewest = min(fewest, most)
    return Standing(
        tier=own.tier or model.tier,
        pinned=model.pinned if own.pinned is None else own.pinned,
        priority=model.priority if own.priority is None else own.priority,
        min_replicas=fewest,
        max_replicas=max(fewest, most),
    )


def gib(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB"
