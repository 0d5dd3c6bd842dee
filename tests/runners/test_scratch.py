"""What a runner leaves outside its memory is found by its name and removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.runners import scratch


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(scratch, "SHARED_MEMORY", folder)
    return folder


def test_each_runner_removes_its_own_only(tmp_path: Path, shared: Path) -> None:
    mine, other = tmp_path / "a.sock", tmp_path / "b.sock"
    for socket in (mine, other):
        scratch.folder_of(socket).mkdir()
        (shared / f"{scratch.shm_prefix(socket)}123").touch()
        (shared / f"sem.{scratch.shm_prefix(socket)}s-4").touch()
    (shared / "psm_of_somebody_else").touch()
    scratch.clear(mine)
    assert not scratch.folder_of(mine).exists() and scratch.folder_of(other).exists()
    left = {file.name for file in shared.iterdir()}
    theirs = scratch.shm_prefix(other)
    assert left == {"psm_of_somebody_else", f"{theirs}123", f"sem.{theirs}s-4"}
    scratch.clear_shared(tmp_path)
    assert [file.name for file in shared.iterdir()] == ["psm_of_somebody_else"]


def test_names_are_short_enough_for_sockets() -> None:
    folder = scratch.folder_of(
        Path("/run/user/1000/hearth-1000-0123456789/a-model-with-a-very-long-name-0.sock")
    )
    assert len(str(folder)) + len("/00000000-0000-0000-0000-000000000000") < 107


def test_a_folder_that_is_not_there_is_no_fault(tmp_path: Path, shared: Path) -> None:
    scratch.clear(tmp_path / "a.sock")
    scratch.clear_shared(tmp_path)
