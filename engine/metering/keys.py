"""API keys: made once, shown once, kept as SHA-256 digests in one JSON file (mode 0600).

A key has 256 random bits, so a plain digest is enough: there is no dictionary to try.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

log = logging.getLogger("hearth.keys")

#: A key shorter than this is shown by no prefix: too much of it would be seen.
_PREFIX_FROM = 24


class Key(BaseModel):
    """What is kept of one key; the key itself is not."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    id: str
    prefix: str = Field(default="", description="The key's first characters, for a person to tell it by.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: int = Field(default=0, description="Unix time.")
    name: str = ""


_KEYS = TypeAdapter(list[Key])


class KeysError(Exception):
    """The keys file cannot be used; the message says why."""


def make_key() -> str:
    """A new key: `hearth-` and 43 URL-safe characters."""
    return "hearth-" + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """The hexadecimal SHA-256 that stands for a key in the file."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(file: Path) -> list[Key]:
    """The keys of a file; none where there is no file.

    Raises:
        KeysError: the file cannot be read or is not a list of keys.
    """
    try:
        return _KEYS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KeysError(f"{file} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise KeysError(
            f"{file} is no list of keys ({where}: {first['msg']}). Restore it, or delete it to start anew."
        ) from error


def add_key(file: Path, key: str, *, name: str = "") -> Key:
    """Adds a key to the file, which is made where missing; a key that is there already stays as it is.

    Raises:
        ValueError: the key is empty or has spaces or characters that no HTTP header can carry.
        KeysError: the file that is there cannot be read.
    """
    if not key or not all("!" <= character <= "~" for character in key):
        raise ValueError("a key is made of printable ASCII characters without spaces, at least one.")
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock", mode=0o600):
        keys = read_keys(file)
        digest = digest_of(key)
        for known in keys:
            if hmac.compare_digest(known.sha256, digest):
                return known
        added = Key(
            id=f"key_{secrets.token_hex(6)}",
            prefix=key[:11] if len(key) >= _PREFIX_FROM else "",
            sha256=digest,
            created=int(time.time()),
            name=name,
        )
        _write(file, [*keys, added])
    return added


def _write(file: Path, keys: list[Key]) -> None:
    """Replaces the file in one step: a reader sees the old list or the new one."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump([key.model_dump() for key in keys], stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class KeyRing:
    """The keys of a file, read again when the file changes (looked at once a second at most)."""

    def __init__(
        self, file: Path, *, clock: Callable[[], float] = time.monotonic, every_s: float = 1.0
    ) -> None:
        self._file = file
        self._clock = clock
        self._every_s = every_s
        self._looked_at = float("-inf")
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}

    def find(self, token: str) -> Key | None:
        """The entry of a key, or None.

        The look-up is by the digest, whose bytes a caller cannot steer; the hit is then compared in
        constant time.
        """
        self._refresh()
        digest = digest_of(token)
        key = self._keys.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None

    def __len__(self) -> int:
        self._refresh()
        return len(self._keys)

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked_at < self._every_s:
            return
        self._looked_at = now
        try:
            status = self._file.stat()
            stamp: tuple[int, int, int] | None = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return
        try:
            self._keys = {key.sha256: key for key in read_keys(self._file)}
        except KeysError as error:
            # A file broken by hand must not lock everybody out: the keys read last stay good.
            log.error("%s The keys read before stay in use.", error)
        self._stamp = stamp
