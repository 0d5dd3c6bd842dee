"""Writes hearth.example.toml from the fields themselves: `python -m engine.example > hearth.example.toml`.

So the example always names every key with its meaning, unit and default; a test holds the file to it.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from engine.config import Config, DedicatedConfig, ModelConfig

_HEAD = """\
Hearth's configuration, every key with its default. Copy it to hearth.toml and change what you need. A key
left out keeps its default; an unknown one is refused. Environment variables win over the file:
HEARTH_PORT=9000, HEARTH_API_KEY=…, and HEARTH_GATEWAY__WORKERS=4 for `workers` of [gateway]."""


def render() -> str:
    """The example file."""
    lines = [_comment(_HEAD), ""]
    sections: list[str] = []
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            sections += ["", _comment((kind.__doc__ or "").strip()), f"[{name}]", *_keys(kind)]
        elif name not in ("models", "dedicated"):
            lines += _key(name, field)
    model = ["", _comment((ModelConfig.__doc__ or "").strip())]
    model += ["# [models.smollm2-135m-instruct]", *_keys(ModelConfig, always_off=True)]
    own = ["", _comment(" ".join((DedicatedConfig.__doc__ or "").split()))]
    own += ["# [dedicated.acme]", *_keys(DedicatedConfig, always_off=True)]
    return "\n".join([*lines, *sections, *model, *own]) + "\n"


def _keys(section: type[BaseModel], *, always_off: bool = False) -> list[str]:
    return [line for name, field in section.model_fields.items() for line in _key(name, field, always_off)]


def _key(name: str, field: FieldInfo, off: bool = False) -> list[str]:
    default = field.get_default(call_default_factory=True, validated_data={})
    written = _toml(default)
    lines = [_comment(field.description or "")]
    if written is None:
        return [*lines, f"# {name} ="]
    return [*lines, f"# {name} = {written}" if off else f"{name} = {written}"]


def _toml(value: Any) -> str | None:
    """A TOML value; None where there is no default to write."""
    if value is None or value is PydanticUndefined or isinstance(value, SecretStr):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, int) and value >= 10_000:
        return f"{value:_}"
    return json.dumps(value)


def _comment(text: str) -> str:
    wrapped = [line for part in text.split("\n") for line in textwrap.wrap(part, 108) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in wrapped)


if __name__ == "__main__":
    print(render(), end="")
