"""Replicas and GPUs that tenants own: what `[dedicated.NAME]` asks for, checked. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.config import Config, DedicatedConfig, ModelConfig
from engine.scheduler.wishes import Entries, PlanError, Standing, Wish, entry_of, with_own_weights
from models.profile import Profile, ProfileModel


def owned_wishes(config: Config, profile: Profile, catalog: Entries, shared: Iterable[Wish]) -> list[Wish]:
    """One wish for each owner and model: as many replicas, always awake, whatever the shared ones' tier.

    Args:
        config: the configuration.
        profile: what it says of a model is true of its owned replicas too, but for tier and number.
        catalog: the models that may be owned.
        shared: the wishes for everybody.

    Raises:
        PlanError: a table names nothing or an unknown model, or would spill over to nowhere.
    """
    served = {wish.id for wish in shared}
    profiled = {model.id: model for model in profile.models}
    found = []
    for owner, own in config.dedicated.items():
        _refuse_empty(owner, own)
        for name, replicas in own.models.items():
            entry = entry_of(catalog, name, f"[dedicated.{_key(owner)}]: ")
            if own.spill_over and name not in served:
                raise PlanError(
                    f"[dedicated.{_key(owner)}]: spill_over = true, but {name} has no shared replicas to "
                    f"spill over to. Serve it to everybody too ([models.{name}]), or leave spill_over out."
                )
            settings = config.models.get(name) or ModelConfig()
            model = profiled.get(name) or ProfileModel(id=name)
            standing = Standing(
                priority=model.priority if settings.priority is None else settings.priority,
                min_replicas=replicas,
                max_replicas=replicas,
                spill_over=own.spill_over,
            )
            entry = with_own_weights(entry, settings)
            found.append(Wish(entry, model, settings, standing, owner, own_gpus=bool(own.gpus)))
    return found


def _refuse_empty(owner: str, own: DedicatedConfig) -> None:
    key = _key(owner)
    if not own.models:
        what = f"owns GPUs {', '.join(map(str, own.gpus))} but no models" if own.gpus else "owns nothing"
        raise PlanError(
            f'[dedicated.{key}]: the tenant {what}. Name its models, models = {{"MODEL" = 1}}, '
            "or remove the table."
        )


def gpu_owners(config: Config, numbers: Sequence[int]) -> dict[int, str]:
    """Who owns which GPU, by its number.

    Args:
        config: the configuration.
        numbers: the GPUs that are there.

    Raises:
        PlanError: a GPU is not there, or owned twice.
    """
    owners: dict[int, str] = {}
    for owner, own in config.dedicated.items():
        for number in own.gpus:
            if number not in numbers:
                there = f"GPUs {', '.join(map(str, numbers))}" if numbers else "none for this profile"
                raise PlanError(
                    f"[dedicated.{_key(owner)}]: GPU {number} is not there; there are {there}. "
                    "Correct `gpus`, or leave it out: the replicas then stand beside the shared ones."
                )
            if number in owners:
                whose = (
                    "twice by the same tenant" if owners[number] == owner else f"by '{owners[number]}' too"
                )
                raise PlanError(
                    f"[dedicated.{_key(owner)}]: GPU {number} is named {whose}. A GPU has one owner: "
                    "take it out of one of the lists."
                )
            owners[number] = owner
    return owners


def device_kinds(products: Mapping[str, str], owners: Mapping[int, str]) -> dict[str, str]:
    """What each device is, for those who may move replicas: its product and owner.

    A replica goes from one device to another of the same kind only, so an owned GPU takes in nobody else's.
    """
    kinds = dict(products)
    for number, owner in owners.items():
        kinds[f"cuda:{number}"] = f"{products.get(f'cuda:{number}', '')} of {owner}"
    return kinds


def _key(owner: str) -> str:
    """The owner as a key of TOML."""
    plain = owner.isascii() and owner.replace("-", "").replace("_", "").isalnum()
    return owner if plain else '"' + owner.replace("\\", "\\\\").replace('"', '\\"') + '"'
