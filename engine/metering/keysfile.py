"""`keys.json`, where keys were kept before there was a database: read at the start, never written."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine.metering.lookup import AccessError


class FileKey(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    id: str
    prefix: str = ""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: int = Field(default=0, description="Unix time, seconds.")
    name: str = ""


_KEYS = TypeAdapter(list[FileKey])


def read_keys(file: Path) -> list[FileKey]:
    """The keys of a file; none where there is no file.

    Raises:
        AccessError: the file cannot be read or is not a list of keys.
    """
    try:
        return _KEYS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AccessError(f"{file} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise AccessError(
            f"{file} is no list of keys ({where}: {first['msg']}). Restore it, or move it away: keys made "
            "since there is a database are not in it."
        ) from error
