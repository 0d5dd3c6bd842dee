"""Hub downloads: what is asked for, and that damage on the way is found."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from models import sources
from models.entry import HubSource
from models.hub import HubFile, Listing, find_damaged, list_files

DATA = b"weights" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()
SOURCE = HubSource(kind="hub", repo="a/b", files=["*.json", "model*.safetensors"])


def silent(*_: object) -> None: ...


class FakeApi:
    """A hub whose repository holds two wanted files and one that nobody asked for."""

    arriving = DATA

    def __init__(self, endpoint: str = "") -> None:
        self.asked: dict[str, Any] = {}

    def model_info(self, repo: str, *, revision: str, files_metadata: bool) -> Any:
        assert files_metadata
        lfs = SimpleNamespace(sha256=DIGEST)
        siblings = [
            SimpleNamespace(rfilename="config.json", size=2, lfs=None),
            SimpleNamespace(rfilename="model.safetensors", size=len(DATA), lfs=lfs),
            SimpleNamespace(rfilename="consolidated.safetensors", size=len(DATA), lfs=lfs),
        ]
        return SimpleNamespace(sha="c" * 40, siblings=siblings)

    def snapshot_download(
        self, repo: str, *, revision: str, local_dir: Path, allow_patterns: list[str]
    ) -> None:
        assert revision == "c" * 40 and allow_patterns == SOURCE.files
        for name, data in (("config.json", b"{}"), ("model.safetensors", self.arriving)):
            if not (local_dir / name).exists():
                (local_dir / name).write_bytes(data)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(sources, "_reach", silent)
    monkeypatch.setattr(FakeApi, "arriving", DATA)
    return FakeApi


def test_a_listing_has_the_files_asked_for_and_their_size() -> None:
    listing = list_files(FakeApi(), "a/b", "main", SOURCE.files)
    assert listing.commit == "c" * 40
    assert listing.files == {
        "config.json": HubFile(2, None),
        "model.safetensors": HubFile(len(DATA), DIGEST),
    }
    assert listing.total_bytes == len(DATA) + 2
    assert len(list_files(FakeApi(), "a/b", "main", []).files) == 3
    assert Listing("c", {"x": HubFile(None, None)}).total_bytes is None
    assert Listing("c", {}).total_bytes is None


def test_missing_short_and_changed_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(DATA)
    (tmp_path / "short").write_bytes(DATA[:-1])
    (tmp_path / "changed").write_bytes(DATA[:-1] + b"x")
    (tmp_path / "unlisted").write_bytes(b"anything")
    listed = HubFile(len(DATA), DIGEST)
    files = dict.fromkeys(("good", "short", "changed", "gone"), listed)
    done: list[tuple[int, int]] = []
    damaged = find_damaged(
        tmp_path, {**files, "unlisted": HubFile(None, None)}, lambda *told: done.append(told)
    )
    assert damaged.keys() == {"short", "changed", "gone"}
    assert damaged["short"] == f"has {len(DATA) - 1} bytes, not {len(DATA)}"
    assert damaged["gone"] == "is missing"
    assert damaged["changed"].startswith("has the sha256") and damaged["changed"].endswith(f"not {DIGEST}")
    assert done and all(0 < part <= whole == 4 * len(DATA) for part, whole in done)


def test_a_download_is_checked_and_tells_its_size(tmp_path: Path, api: type[FakeApi]) -> None:
    said: list[tuple[int, int | None, str]] = []
    sources.fetch_hub(SOURCE, tmp_path, lambda *told: said.append(told), "http://hub")
    assert (tmp_path / "model.safetensors").read_bytes() == DATA
    assert (len(DATA), len(DATA) + 2, "checking a/b") in said


def test_a_killed_try_leaves_its_whole_files_to_the_next_and_no_half_ones(
    tmp_path: Path, api: type[FakeApi]
) -> None:
    half = tmp_path / ".cache" / "huggingface" / "download" / "x.abc.incomplete"
    half.parent.mkdir(parents=True)
    half.write_bytes(DATA[:100])
    (tmp_path / "model.safetensors").write_bytes(DATA)
    inode = (tmp_path / "model.safetensors").stat().st_ino
    seen: list[bool] = []
    sources.fetch_hub(SOURCE, tmp_path, lambda *_: seen.append(half.exists()), "http://hub")
    assert seen and not any(seen)
    assert (tmp_path / "model.safetensors").stat().st_ino == inode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_damaged_file_is_removed_and_the_next_try_fetches_it_anew(
    tmp_path: Path, api: type[FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeApi, "arriving", DATA[:-1] + b"x")
    with pytest.raises(sources.SourceError, match=r"a/b: model.safetensors has the sha256 .* try again"):
        sources.fetch_hub(SOURCE, tmp_path, silent, "http://hub")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    monkeypatch.setattr(FakeApi, "arriving", DATA)
    sources.fetch_hub(SOURCE, tmp_path, silent, "http://hub")
    assert (tmp_path / "model.safetensors").read_bytes() == DATA
