"""The file of the shared table: made, found broken, full of seats; and what several processes do with it."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.metering import shared_counts
from engine.metering.limits import Admitted, Limits, Refused
from engine.metering.shared_counts import CountsError, SharedCounts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "limits"


@pytest.fixture
def table(file: Path) -> Iterator[Callable[[], SharedCounts]]:
    made: list[SharedCounts] = []

    def opened() -> SharedCounts:
        made.append(SharedCounts(file, rows=16, seats=3))
        return made[-1]

    yield opened
    for each in made:
        each.close()


def test_it_is_its_owners_alone(table: Callable[[], SharedCounts], file: Path) -> None:
    table()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_it_outlives_its_workers(table: Callable[[], SharedCounts], file: Path) -> None:
    first = SharedCounts(file, rows=16, seats=3)
    first.tat[first.row("k", 5)] = 99
    first.close()
    again = table()
    assert again.tat[again.row("k", 5)] == 99


@pytest.mark.parametrize("what", ["junk", "short", "long", "version", "rows", "seats", "boot"])
def test_a_file_that_cannot_be_used_is_begun_anew(
    table: Callable[[], SharedCounts],
    file: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = SharedCounts(file, rows=32 if what == "rows" else 16, seats=3)
    old.tat[old.row("k", 5)] = 99
    data = file.read_bytes()
    if what == "junk":
        file.write_bytes(os.urandom(len(data)))
    elif what == "short":
        os.truncate(file, len(data) - 1)
    elif what == "long":
        os.truncate(file, len(data) + 1)
    elif what == "version":
        monkeypatch.setattr(shared_counts, "_VERSION", shared_counts._VERSION + 1)
    elif what == "seats":
        with file.open("r+b") as handle:
            handle.seek(shared_counts._TAKEN_AT)
            handle.write(b"\xff\xff\xff\xff")
    elif what == "boot":
        monkeypatch.setattr(shared_counts, "_boot", lambda: b"another boot----")
    with caplog.at_level(logging.WARNING):
        fresh = table()
    assert "begun anew" in caplog.text
    assert fresh.tat[fresh.row("k", 5)] == 0
    # Who lives with the old one is left alone, and can see that it is the old one.
    assert not old.is_current()
    assert fresh.is_current()
    assert [each.name for each in file.parent.iterdir()] == ["limits"]
    # The second look finds nothing wrong.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        table()
    assert caplog.text == ""
    old.abandon()


def test_where_it_cannot_be_made_the_message_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CountsError, match=r"file/limits cannot be used: .*XDG_RUNTIME_DIR"):
        SharedCounts(tmp_path / "file" / "limits")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CountsError, match="cannot be used"):
        SharedCounts(tmp_path / "link")


def test_seats_are_given_to_the_living_alone(table: Callable[[], SharedCounts], file: Path) -> None:
    one, two, killed = table(), table(), SharedCounts(file, rows=16, seats=3)
    assert [each.seat for each in (one, two, killed)] == [0, 1, 2]
    with pytest.raises(CountsError, match="all 3 seats"):
        table()
    # The refused one has not kept the lock.
    killed.lock()
    row = killed.row("k", 5)
    killed.add(row, 4)
    killed.unlock()
    assert not one.forget_dead(row)
    assert one.total(row) == two.total(row) == 4
    killed.abandon()
    # Who takes the seat of a dead one begins with nothing.
    assert table().seat == 2
    assert one.total(row) == 0


def test_a_time_that_is_nonsense_holds_no_row(table: Callable[[], SharedCounts]) -> None:
    counts = table()
    for number in range(16):
        counts.tat[counts.row(f"k{number}", 5)] = 2**62
    assert counts.row("one more", 5) in range(16)


def test_those_who_open_it_at_once_share_it(file: Path) -> None:
    begin, made = threading.Barrier(8), []

    def opened() -> None:
        begin.wait()
        made.append(SharedCounts(file, rows=16, seats=8))

    threads = [threading.Thread(target=opened) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.seat for each in made) == list(range(8))
    assert all(each.is_current() for each in made)
    for each in made:
        each.close()


def start(code: str, file: Path, *arguments: str) -> subprocess.Popen[str]:
    """A worker process that runs `code` with `limits` at hand."""
    head = "import sys, time\nfrom pathlib import Path\nfrom engine.metering.limits import *\n"
    head += "limits = Limits(Path(sys.argv[1]))\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, str(file), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(code: str, file: Path, processes: int, *arguments: str) -> list[str]:
    """What each of some processes printed that begin together."""
    running = [start(code, file, *arguments) for _ in range(processes)]
    try:
        for each in running:
            assert each.stdout is not None and each.stdout.readline() == "ready\n"
        for each in running:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        return [each.communicate(timeout=60)[0] for each in running]
    finally:
        for each in running:
            each.kill()
            each.communicate()


HAMMER = """
first, admitted, until = None, 0, time.monotonic_ns() + int(float(sys.argv[2]) * 1e9)
while True:
    before = time.monotonic_ns()
    told = limits.admit("k", per_minute=600, concurrent=None)
    after = time.monotonic_ns()
    if isinstance(told, Admitted):
        admitted += 1
        first = first or (before, after)
    elif before > until:
        break
print(admitted, *(first or (2**62, 2**62)), before, after)
"""


def test_processes_together_admit_burst_and_refill_exactly(file: Path) -> None:
    told = [[int(word) for word in line.split()] for line in run(HAMMER, file, 4, "1.2")]
    admitted = sum(each[0] for each in told)
    # The bucket begins to fill with the first admission; each process ends with a refusal, at which moment
    # all that had come was taken.
    began = min(each[1] for each in told), min(each[2] for each in told)
    ended = [(each[3], each[4]) for each in told]
    interval = 100_000_000
    least = 600 + (max(before for before, _ in ended) - began[1]) // interval
    most = 600 + (max(after for _, after in ended) - began[0]) // interval
    assert least <= admitted <= most
    assert most - 600 >= 12


HOLD = """
held = []
for _ in range(int(sys.argv[2])):
    if isinstance(limits.admit("k", per_minute=None, concurrent=3), Admitted):
        since = time.monotonic_ns()
        time.sleep(0.0002)
        until = time.monotonic_ns()
        limits.leave("k")
        held.append(f"{since}-{until}")
print(*held)
"""


def test_processes_together_never_hold_more_than_the_limit(file: Path) -> None:
    moments: list[tuple[int, int]] = []
    for line in run(HOLD, file, 5, "400"):
        for word in line.split():
            since, until = map(int, word.split("-"))
            moments += [(since, 1), (until, -1)]
    in_hand = most = 0
    for _, change in sorted(moments):
        in_hand += change
        most = max(most, in_hand)
    assert 1 < most <= 3
    assert len(moments) > 400
    last = Limits(file)
    assert last.in_hand("k") == 0
    last.close()


def test_what_a_killed_process_had_in_hand_is_free_at_once(file: Path) -> None:
    here = Limits(file)
    here.admit("k", per_minute=None, concurrent=4)
    code = 'for _ in range(3): limits.admit("k", per_minute=None, concurrent=4)\n'
    there = start(code + "print('held', flush=True)\ntime.sleep(60)", file)
    try:
        there.stdin.write("\n")
        there.stdin.flush()
        assert [there.stdout.readline() for _ in range(2)] == ["ready\n", "held\n"]
        assert here.in_hand("k") == 4
        refused = here.admit("k", per_minute=None, concurrent=4)
        assert isinstance(refused, Refused) and refused.reason == "concurrent"
        # Stopped is not dead.
        there.send_signal(signal.SIGSTOP)
        assert isinstance(here.admit("k", per_minute=None, concurrent=4), Refused)
        there.kill()
        there.wait()
        assert isinstance(here.admit("k", per_minute=None, concurrent=4), Admitted)
        assert here.in_hand("k") == 2
    finally:
        there.kill()
        there.communicate()
        here.close()


KILLED = """
while True:
    told = limits.admit("k", per_minute=60, concurrent=2)
    if isinstance(told, Admitted):
        limits.leave("k")
    limits.admit(f"other {time.monotonic_ns()}", per_minute=10**9, concurrent=None)
"""


def test_processes_killed_at_any_moment_leave_a_table_that_counts_right(file: Path) -> None:
    here = Limits(file)
    began = time.monotonic_ns()
    while isinstance(here.admit("k", per_minute=60, concurrent=2), Admitted):
        here.leave("k")
    for pause in (0.02, 0.003, 0.005, 0.001):
        running = [start(KILLED, file) for _ in range(2)]
        for each in running:
            assert each.stdout.readline() == "ready\n"
            each.stdin.write("\n")
            each.stdin.flush()
        time.sleep(pause)
        for each in running:
            each.kill()
            each.communicate()
    looked = time.monotonic_ns()
    told = here.look("k", per_minute=60)
    assert told.remaining is not None and 0 <= told.remaining <= (looked - began) // 10**9 + 1
    assert here.in_hand("k") == 0
    taken = 0
    while isinstance(here.admit("k", per_minute=60, concurrent=2), Admitted):
        here.leave("k")
        taken += 1
    assert told.remaining <= taken <= told.remaining + (time.monotonic_ns() - looked) // 10**9 + 1
    here.close()


def _is_free(table: SharedCounts) -> bool:
    """Whether another handle could have the flock now."""
    handle = os.open(table.file, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def test_who_is_alone_needs_no_flock_until_somebody_comes(table: Callable[[], SharedCounts]) -> None:
    first = table()
    first.lock()
    assert _is_free(first)
    first.unlock()
    second = table()
    for each in (first, second):
        each.lock()
        assert not _is_free(first)
        each.unlock()


def test_a_newcomer_waits_for_who_is_in_there(table: Callable[[], SharedCounts]) -> None:
    first = table()
    first.lock()
    came: list[SharedCounts] = []
    coming = threading.Thread(target=lambda: came.append(table()))
    coming.start()
    coming.join(0.1)
    assert not came
    first.unlock()
    coming.join(5)
    assert len(came) == 1


def test_a_newcomer_does_not_wait_for_the_dead(table: Callable[[], SharedCounts], file: Path) -> None:
    dead = SharedCounts(file, rows=16, seats=3)
    dead.lock()
    dead.abandon()
    began = time.monotonic()
    table()
    assert time.monotonic() - began < shared_counts._OUT_S


def test_who_is_left_alone_notices(table: Callable[[], SharedCounts], file: Path) -> None:
    first = table()
    SharedCounts(file, rows=16, seats=3).close()
    first.lock()
    assert not _is_free(first)
    first.unlock()
    first.look_around()
    first.lock()
    assert _is_free(first)
    first.unlock()
