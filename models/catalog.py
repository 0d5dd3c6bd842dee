"""The catalog of models and the profiles that pick from it: read from TOML, checked as a whole."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.errors import nearest
from models.entry import ModelEntry
from models.profile import Profile

ROOT = Path(__file__).resolve().parent.parent
CATALOG_DIR = ROOT / "models" / "catalog"
PROFILES_DIR = ROOT / "models" / "profiles"
CPU_PROFILE = "tiny"


class CatalogError(Exception):
    """A catalog or profile cannot be used, or a name is unknown; the message says why."""


class Catalog:
    """All model entries, by serving name and alias."""

    def __init__(self, entries: Iterable[ModelEntry]) -> None:
        """Takes the entries in their order.

        Raises:
            CatalogError: two entries claim one name.
        """
        self.entries: dict[str, ModelEntry] = {}
        self._by_name: dict[str, ModelEntry] = {}
        for entry in entries:
            for name in (entry.id, *entry.aliases):
                other = self._by_name.get(name)
                if other is not None:
                    raise CatalogError(
                        f"'{name}' names both {other.id} and {entry.id}; give one another name."
                    )
                self._by_name[name] = entry
            self.entries[entry.id] = entry

    def find(self, name: str) -> ModelEntry:
        """The entry with this id or alias.

        Raises:
            CatalogError: no entry has it; the message gives the nearest names.
        """
        entry = self._by_name.get(name)
        if entry is None:
            raise CatalogError(_unknown("model", name, self._by_name, "models/catalog/"))
        return entry


def load_catalog(folder: Path = CATALOG_DIR) -> Catalog:
    """Reads every ``*.toml`` of ``folder``; each holds ``[[model]]`` tables.

    Raises:
        CatalogError: a file is no TOML, an entry is wrong, or two entries claim one name.
    """
    entries: list[ModelEntry] = []
    for file in sorted(folder.glob("*.toml")):
        data = _read(file)
        for key in data.keys() - {"model"}:
            raise CatalogError(f"{file}: unknown table '{key}'; a catalog file holds [[model]] tables only.")
        for number, table in enumerate(data.get("model", []), start=1):
            name = table.get("id", f"model number {number}")
            try:
                entries.append(ModelEntry.model_validate(table))
            except ValidationError as error:
                raise CatalogError(_explain(file, name, error, ModelEntry.model_fields)) from error
    if not entries:
        raise CatalogError(f"{folder}: no model entries found; the catalog's TOML files are missing.")
    return Catalog(entries)


def profile_names(folder: Path = PROFILES_DIR) -> list[str]:
    """The names of all profiles, sorted."""
    return sorted(file.stem for file in folder.glob("*.toml"))


def load_profile(name: str, folder: Path = PROFILES_DIR) -> Profile:
    """Reads ``<folder>/<name>.toml``.

    Raises:
        CatalogError: there is no such profile, or it is wrong.
    """
    names = profile_names(folder)
    if name not in names:
        raise CatalogError(_unknown("profile", name, names, f"{folder}/"))
    file = folder / f"{name}.toml"
    try:
        profile = Profile.model_validate(_read(file))
    except ValidationError as error:
        raise CatalogError(_explain(file, name, error, Profile.model_fields)) from error
    if profile.name != name:
        raise CatalogError(f"{file}: name = '{profile.name}' differs from the file's name; make them equal.")
    twice = sorted({m.id for m in profile.models if sum(n.id == m.id for n in profile.models) > 1})
    if twice:
        raise CatalogError(f"{file}: {', '.join(twice)} listed twice; use replicas = 2 for two processes.")
    return profile


def load_profiles(folder: Path = PROFILES_DIR) -> list[Profile]:
    """Every profile, by name."""
    return [load_profile(name, folder) for name in profile_names(folder)]


def choose_profile(profiles: Sequence[Profile], gpus: Sequence[int], host_memory: int) -> str:
    """The name of the largest profile that fits a machine.

    Args:
        profiles: what there is to choose from.
        gpus: memory of each GPU, bytes; empty = none.
        host_memory: bytes.

    Among those that fit, the one made for most GPU memory in all wins, so a GPU machine never gets a CPU
    profile while a GPU one fits. Those taken by name only are left out.

    Raises:
        CatalogError: none fits; the message says what the smallest asks for.
    """

    def fits(profile: Profile) -> bool:
        needs = profile.needs
        big_enough = sum(memory >= needs.gpu_memory_bytes for memory in gpus)
        return not profile.plan_only and big_enough >= needs.gpus and host_memory >= needs.memory_bytes

    def size(profile: Profile) -> tuple[int, int, str]:
        return profile.needs.gpus * profile.needs.gpu_memory_bytes, profile.needs.memory_bytes, profile.name

    choice = [profile for profile in profiles if not profile.by_name]
    fitting = [profile for profile in choice if fits(profile)]
    if not fitting:
        least = min(choice, key=size, default=None)
        asks = (
            f"the smallest, '{least.name}', asks for {_gib(least.needs.memory_bytes)}"
            if least
            else "there is none"
        )
        raise CatalogError(f"no profile fits this machine with {_gib(host_memory)} of memory: {asks}.")
    return max(fitting, key=size).name


def merge_options(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One options table from several, later ones winning; tables inside tables are merged, not replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            merged[key] = merge_options(old, value) if both else value  # type: ignore[arg-type]  # narrowed by `both`
    return merged


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{file} is not valid TOML: {error}.") from error
    except OSError as error:
        raise CatalogError(f"{file} cannot be read: {error}.") from error


def _explain(file: Path, name: str, error: ValidationError, fields: Iterable[str]) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            close = nearest(where, fields, most=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(fields)}."
            lines.append(f"{file}: {name}: unknown key '{where}'; {hint}")
        else:
            lines.append(f"{file}: {name}: {where}: {item['msg']}.")
    return "\n".join(lines)


def _unknown(kind: str, name: str, known: Iterable[str], place: str) -> str:
    names = sorted(known)
    close = nearest(name, names)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(names[:12])}."
    return f"there is no {kind} '{name}' in {place}. {hint}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
