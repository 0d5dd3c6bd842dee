"""A worker's counters, as another process reads them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.metering import counters as module
from engine.metering.counters import Tally, read_counters


def test_they_frame_what_is_durable(tmp_path: Path) -> None:
    tally = Tally(tmp_path, "w-1")
    tally.begin(3)
    (seen,) = read_counters(tmp_path)
    assert (seen.worker, seen.recorded, seen.charge, seen.waiting) == ("w-1", 0, 0, 3)
    tally.end(2, 2**80, durable=True)
    tally.end(1, 5, durable=False)
    (seen,) = read_counters(tmp_path)
    assert (seen.recorded, seen.charge, seen.waiting) == (2, 2**80, 0)
    tally.close()
    assert read_counters(tmp_path) == [seen]


def test_they_outlive_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, os, signal\n"
        "from engine.metering.counters import Tally\n"
        "tally = Tally(pathlib.Path(sys.argv[1]), 'w-1')\n"
        "tally.begin(7)\n"
        "tally.end(4, 12, durable=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    (seen,) = read_counters(tmp_path)
    assert (seen.recorded, seen.charge, seen.waiting) == (4, 12, 3)


def test_a_reader_never_sees_half_of_an_update(tmp_path: Path) -> None:
    tally = Tally(tmp_path, "w-1")
    ends = threading.Event()

    def work() -> None:
        while not ends.is_set():
            tally.begin(1)
            tally.end(1, 10**12, durable=True)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(2000):
            for seen in read_counters(tmp_path):
                assert seen.charge == seen.recorded * 10**12
                assert seen.waiting in (0, 1)
    finally:
        ends.set()
        thread.join()
        tally.close()


def test_after_a_loss_of_power_they_only_bound_from_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally(tmp_path, "w-1")
    tally.begin(2)
    tally.end(2, 6, durable=True)
    tally.close()
    monkeypatch.setattr(module, "boot_id", lambda: b"another" + bytes(9))
    (seen,) = read_counters(tmp_path)
    assert seen.recorded == 2
    assert seen.waiting > 10**12


def test_what_is_no_counters_file_is_left_out(tmp_path: Path) -> None:
    assert read_counters(tmp_path / "none") == []
    (tmp_path / "w-1.counters").write_bytes(b"something else")
    (tmp_path / "w-2.counters").write_bytes(b"")
    assert read_counters(tmp_path) == []
