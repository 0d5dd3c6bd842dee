"""What one gateway process is told at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engine.config import Config


class GatewaySettings(BaseModel):
    """The file that `--settings` names."""

    model_config = ConfigDict(extra="ignore")
    config: dict[str, Any] = Field(description="engine.config.Config as JSON, without api_key.")

    def load(self) -> Config:
        """The typed configuration."""
        return Config(**{key: value for key, value in self.config.items() if key != "api_key"})


def read_settings(file: Path) -> Config:
    """Reads a settings file.

    Raises:
        OSError: it cannot be read.
        pydantic.ValidationError: it is not what this version writes.
    """
    return GatewaySettings.model_validate_json(file.read_bytes()).load()
