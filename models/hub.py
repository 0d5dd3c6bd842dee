"""What a repository of the model hub holds, and whether a download is that, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

_THREADS = 4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class HubFile:
    """One file as the hub lists it; None where it does not say. Only large files have a sha256."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files that were asked for, at one commit."""

    commit: str
    files: Mapping[str, HubFile]

    @property
    def total_bytes(self) -> int | None:
        """Of all files together; None where the hub does not tell each one's size."""
        sizes = [file.size for file in self.files.values()]
        return sum(size for size in sizes if size is not None) if sizes and None not in sizes else None


def list_files(api: Any, repo: str, revision: str, patterns: Iterable[str]) -> Listing:
    """Asks the hub for the files of ``repo`` that match one of ``patterns`` (none = all).

    Args:
        api: a ``huggingface_hub.HfApi``; its errors come through.
    """
    info = api.model_info(repo, revision=revision, files_metadata=True)
    wanted = list(patterns) or ["*"]
    files = {
        file.rfilename: HubFile(file.size, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
        if any(fnmatch(file.rfilename, pattern) for pattern in wanted)
    }
    return Listing(info.sha or revision, files)


def find_damaged(
    folder: Path, files: Mapping[str, HubFile], report: Callable[[int, int], None]
) -> dict[str, str]:
    """The files in ``folder`` that differ from what the hub lists, each with the reason.

    Args:
        report: told the bytes checked and those to check, from several threads.
    """
    total = sum(file.size or 0 for file in files.values())
    done = 0

    def check(name: str, file: HubFile) -> str:
        nonlocal done
        path = folder / name
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            return f"has {size} bytes, not {file.size}"
        if file.sha256 is None:
            return ""
        seen = hashlib.sha256()
        with path.open("rb") as data:
            while chunk := data.read(_CHUNK):
                seen.update(chunk)
                # Advisory: two threads may overwrite each other's count.
                done += len(chunk)
                report(min(done, total), total)
        digest = seen.hexdigest()
        return "" if digest == file.sha256 else f"has the sha256 {digest}, not {file.sha256}"

    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = dict(zip(files, pool.map(check, files, files.values()), strict=True))
    return {name: reason for name, reason in reasons.items() if reason}
