"""Preparation: order of sources, whole or nothing, one at a time, and what its watchers read."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from models import convert, prepare, sources
from models.entry import ModelEntry, PackageSource
from models.prepare import MARKER, PrepareError, fingerprint_of, is_complete
from models.progress import Progress, ProgressFile
from tests.models.test_sources import DIGEST, WEIGHTS


def make_entry(*sources_: object, **fields: object) -> ModelEntry:
    default = {"kind": "pypi", "package": "toy", "version": "1", "files": {"toy/model.bin": DIGEST}}
    data = {"id": "toy", "category": "chat", "engine": "vllm", "sources": list(sources_) or [default]}
    return ModelEntry.model_validate({**data, **fields})


HUB = {"kind": "hub", "repo": "a/b"}


class Fetches:
    """Stands in for the network: counts, and gives a file or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()
        monkeypatch.setattr(sources, "fetch_package", self.package)
        monkeypatch.setattr(sources, "fetch_hub", self.hub)

    def package(self, source: PackageSource, work: Path, report: sources.Report) -> dict[str, Path]:
        self.count += 1
        assert self.hold.wait(10)
        if self.fail:
            raise self.fail
        report(500, 1000, "downloading toy==1")
        path = work / "members" / "model.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(WEIGHTS)
        return {"model.bin": path}

    def hub(self, source: object, target: Path, report: sources.Report, endpoint: str) -> None:
        self.count += 1
        (target / "from_hub.json").write_text(endpoint)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    return Fetches(monkeypatch)


def run(entry: ModelEntry, folder: Path, offline: bool = False, said: list[Progress] | None = None) -> Path:
    return prepare.prepare(entry, folder, offline, (said if said is not None else []).append, "http://hub")


def test_a_package_is_fetched_once_and_kept(tmp_path: Path, fetches: Fetches) -> None:
    said: list[Progress] = []
    path = run(make_entry(), tmp_path, said=said)
    assert path == tmp_path / "toy" and (path / "model.bin").read_bytes() == WEIGHTS
    assert [(p.stage, p.done, p.total, p.unit) for p in said] == [
        ("download", 500, 1000, "bytes"),
        ("done", 1, 1, "share"),
    ]
    assert run(make_entry(), tmp_path) == path and run(make_entry(), tmp_path, offline=True) == path
    assert fetches.count == 1
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".lock")) == ["toy"]


def test_models_of_one_key_share_a_folder(tmp_path: Path, fetches: Fetches) -> None:
    first = run(make_entry(weights_key="shared"), tmp_path)
    second = run(make_entry(id="other", weights_key="shared"), tmp_path)
    assert first == second == tmp_path / "shared" and fetches.count == 1


def test_two_at_once_wait_for_each_other(tmp_path: Path, fetches: Fetches) -> None:
    fetches.hold.clear()
    said: list[Progress] = []
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(run(make_entry(), tmp_path, said=said)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while not any("waiting" in p.message for p in said) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetches.count == 1
    fetches.hold.set()
    for thread in threads:
        thread.join(10)
    assert paths == [tmp_path / "toy"] * 2 and fetches.count == 1


def test_the_next_source_is_tried_when_one_gives_nothing(tmp_path: Path, fetches: Fetches) -> None:
    fetches.fail = sources.SourceError("no network.")
    local = {"kind": "local", "path": str(tmp_path / "absent")}
    default = make_entry().sources[0].model_dump()
    path = run(make_entry(local, default, HUB), tmp_path)
    assert (path / "from_hub.json").read_text() == "http://hub"


def test_when_none_gives_anything_each_reason_is_told_and_nothing_is_left(
    tmp_path: Path, fetches: Fetches
) -> None:
    fetches.fail = sources.SourceError("the index is away.")
    local = {"kind": "local", "path": str(tmp_path / "absent")}
    with pytest.raises(
        PrepareError, match=r"toy: no source gave its weights. .*absent does not exist. the index"
    ):
        run(make_entry(local, make_entry().sources[0].model_dump()), tmp_path)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".lock")] == []


def test_a_local_folder_comes_as_it_lies(tmp_path: Path, fetches: Fetches) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    local = {"kind": "local", "path": str(tmp_path / "mine")}
    assert run(make_entry(local, HUB), tmp_path / "weights") == tmp_path / "mine"
    assert run(make_entry(HUB, local), tmp_path / "weights", offline=True) == tmp_path / "mine"
    assert fetches.count == 0 and not (tmp_path / "weights").exists()


def test_offline_fetches_nothing_and_says_what_to_do(tmp_path: Path, fetches: Fetches) -> None:
    with pytest.raises(
        PrepareError, match=r"toy is not prepared in .*offline forbids.*Run once with the network"
    ):
        run(make_entry(), tmp_path, offline=True)
    assert fetches.count == 0


def test_half_a_folder_does_not_count(tmp_path: Path, fetches: Fetches) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "junk").write_text("half")
    assert not (run(make_entry(), tmp_path) / "junk").exists()
    assert fetches.count == 1


def test_other_sources_or_another_conversion_make_it_anew(
    tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "find", lambda name: lambda files, target, progress: (target / "y").touch())
    one = make_entry(convert="whisper")
    run(one, tmp_path)
    assert is_complete(tmp_path / "toy", fingerprint_of(one))
    monkeypatch.setitem(convert.CONVERSIONS, "whisper", 99)
    assert not is_complete(tmp_path / "toy", fingerprint_of(one))
    run(one, tmp_path)
    assert fetches.count == 2
    assert fingerprint_of(one) != fingerprint_of(make_entry(HUB))


def test_a_conversion_reads_the_files_by_name_and_tells_how_far_it_is(
    tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn(files: dict[str, Path], target: Path, progress: convert.Progress) -> None:
        progress("halfway", 0.5)
        (target / "turned").write_bytes(files["model.bin"].read_bytes()[::-1])

    monkeypatch.setattr(convert, "find", lambda name: turn)
    said: list[Progress] = []
    path = run(make_entry(convert="smollm2"), tmp_path, said=said)
    assert sorted(p.name for p in path.iterdir()) == [MARKER, "turned"]
    assert ("convert", 0.5, 1, "share") in [(p.stage, p.done, p.total, p.unit) for p in said]


def test_an_unknown_conversion_is_named(tmp_path: Path, fetches: Fetches) -> None:
    with pytest.raises(PrepareError, match=r"no conversion 'magic'. Known: smollm2, whisper"):
        run(make_entry(convert="magic"), tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, fetches: Fetches) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareError, match=r"file cannot be made: .* Set weights.dir to another"):
        run(make_entry(), tmp_path / "file")


def test_the_progress_file_is_replaced_whole_and_not_too_often(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    progress = ProgressFile(file)
    progress.write(Progress(stage="download", done=1, message="a"))
    progress.write(Progress(stage="download", done=2, message="a"))
    assert json.loads(file.read_text())["done"] == 1
    progress.write(Progress(stage="convert", done=0.5, total=1, message="b"))
    expected = {"stage": "convert", "done": 0.5, "total": 1.0, "unit": "share", "message": "b"}
    assert json.loads(file.read_text()) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def command(tmp_path: Path, entry: ModelEntry, *more: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "entry.json"
    file.write_text(entry.model_dump_json())
    line = [sys.executable, "-m", "models.prepare", "--entry", str(file), "--weights", str(tmp_path / "w")]
    line += ["--progress", str(tmp_path / "p.json"), *more]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_prints_the_folder_last(tmp_path: Path) -> None:
    source = {"kind": "local", "path": "models/tiny/vision/weights"}
    done = command(tmp_path, make_entry(source))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).name == "weights"
    assert json.loads((tmp_path / "p.json").read_text())["stage"] == "done"


def test_the_command_fails_with_one_sentence(tmp_path: Path) -> None:
    done = command(tmp_path, make_entry(), "--offline")
    assert done.returncode == 1 and "offline forbids" in done.stderr and "Traceback" not in done.stderr
    state = json.loads((tmp_path / "p.json").read_text())
    assert state["stage"] == "failed" and "offline forbids" in state["message"]
