"""The journal: whole after any crash, bounded, and held by one living process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.metering import journal as module
from engine.metering.journal import (
    HEAD_BYTES,
    Journal,
    JournalError,
    JournalFullError,
    JournalHeldError,
    left_behind,
    pack,
    read_only,
    unpack,
)

RECORDS = st.lists(st.binary(max_size=60), max_size=8)


def file_of(body: bytes) -> bytes:
    """A journal's bytes, with nothing zeroed ahead."""
    return module._HEADER.pack(module._FILE_MARK, 0) + body


def open_at(folder: Path, *, most_bytes: int = 100_000) -> Journal:
    return Journal(folder / "one.journal", most_bytes=most_bytes)


@given(RECORDS)
def test_what_is_packed_comes_back(records: list[bytes]) -> None:
    assert unpack(pack(records)) == (records, [])


@given(RECORDS, st.integers(min_value=0))
def test_a_torn_end_loses_only_records_that_are_not_whole(records: list[bytes], cut: int) -> None:
    data = pack(records)
    cut %= len(data) + 1
    kept, _ = unpack(data[:cut])
    whole = 0
    while len(pack(records[: whole + 1])) <= cut and whole < len(records):
        whole += 1
    assert kept == records[:whole]


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=3, max_size=8), st.data())
def test_a_damaged_byte_costs_one_record(records: list[bytes], data: st.DataObject) -> None:
    victim = data.draw(st.integers(0, len(records) - 1))
    start = len(pack(records[:victim]))
    place = data.draw(st.integers(start, start + HEAD_BYTES + len(records[victim]) - 1))
    raw = bytearray(pack(records))
    raw[place] ^= 0xFF
    kept, damage = unpack(bytes(raw))
    assert kept == records[:victim] + records[victim + 1 :]
    ((begin, end),) = damage
    # What is damaged at the very end of the file is counted without the zeroes behind it.
    assert begin == start
    assert place < end <= start + HEAD_BYTES + len(records[victim])


def test_records_are_there_after_opening_again(tmp_path: Path) -> None:
    with open_at(tmp_path) as journal:
        journal.append([b"a", b"b"])
        journal.append([b"c"])
        assert journal.records() == [b"a", b"b", b"c"]
    with open_at(tmp_path) as again:
        assert again.records() == [b"a", b"b", b"c"]
        again.drop(again.end)
        assert (again.records(), again.size) == ([], 0)
        again.append([b"d"])
    assert read_only(tmp_path / "one.journal") == ([b"d"], 0)


def test_an_unfinished_end_is_cut_and_the_next_record_follows(tmp_path: Path) -> None:
    with open_at(tmp_path) as journal:
        journal.append([b"whole"])
    file = tmp_path / "one.journal"
    data = bytearray(file.read_bytes())
    torn = pack([b"unfinished"])[:-1]
    place = len(file_of(pack([b"whole"])))
    data[place : place + len(torn)] = torn
    file.write_bytes(data)
    with open_at(tmp_path) as again:
        again.append([b"next"])
        assert again.records() == [b"whole", b"next"]


def test_damage_in_the_middle_keeps_the_others_and_a_copy(tmp_path: Path) -> None:
    raw = bytearray(pack([b"first", b"second", b"third"]))
    raw[len(pack([b"first"])) + HEAD_BYTES] ^= 1
    (tmp_path / "one.journal").write_bytes(file_of(bytes(raw)))
    with open_at(tmp_path) as journal:
        assert journal.records() == [b"first", b"third"]
        journal.append([b"fourth"])
        assert journal.records() == [b"first", b"third", b"fourth"]
    (copy,) = tmp_path.glob("*.damaged-*")
    assert copy.read_bytes() == file_of(bytes(raw))


def test_a_full_journal_takes_nothing_and_says_so(tmp_path: Path) -> None:
    with open_at(tmp_path, most_bytes=2 * (HEAD_BYTES + 4)) as journal:
        journal.append([b"1234"])
        with pytest.raises(JournalFullError, match="nothing is lost"):
            journal.append([b"1234", b"1234"])
        journal.append([b"5678"])
        assert journal.records() == [b"1234", b"5678"]


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, JournalFullError), (errno.EIO, JournalError)])
def test_a_failing_disk_leaves_no_part_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    with open_at(tmp_path) as journal:
        journal.append([b"before"])

        def half(handle: int, data: bytes, place: int) -> None:
            os.pwrite(handle, data[: len(data) // 2], place)
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(module, "_write_at", half)
            with pytest.raises(kind, match=os.strerror(code)):
                journal.append([b"lost", b"too"])
        journal.append([b"after"])
        assert journal.records() == [b"before", b"after"]


def test_one_process_holds_it_and_its_death_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time\n"
        "from engine.metering.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), most_bytes=1000)\n"
        "journal.append([b'row'])\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    file = tmp_path / "one.journal"
    holder = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(JournalHeldError, match="living process"):
            Journal(file, most_bytes=1000)
        assert list(left_behind(tmp_path, most_bytes=1000)) == []
    finally:
        holder.kill()
        holder.communicate()
    (journal,) = left_behind(tmp_path, most_bytes=1000)
    assert journal.records() == [b"row"]
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(tmp_path / "file" / "one.journal", most_bytes=1000)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=25))
def test_what_is_dropped_goes_and_the_rest_stays(steps: list[tuple[int, int]]) -> None:
    """Batches are added, and dropped up to one of the last; a reader without the lock sees the same."""
    with tempfile.TemporaryDirectory() as folder, open_at(Path(folder)) as journal:
        ends: list[int] = []
        number = dropped = 0
        added: list[list[bytes]] = []
        for size, behind in steps:
            batch = [b"%d" % (number + each) for each in range(size)]
            number += size
            journal.append(batch)
            added.append(batch)
            ends.append(journal.end)
            if behind < len(ends):
                place = len(ends) - 1 - behind
                journal.drop(ends[place])
                dropped = max(dropped, place + 1)
            kept = [record for some in added[dropped:] for record in some]
            found, damaged = read_only(journal.file)
            assert damaged == 0
            # Dropped ones may still be there where copying would not have been worth it.
            assert found[len(found) - len(kept) :] == kept
            assert found == journal.records()
        journal.drop(ends[-1])
        assert (journal.records(), journal.size) == ([], 0)


def test_a_long_journal_is_short_again_after_it_was_folded(tmp_path: Path) -> None:
    with open_at(tmp_path, most_bytes=8_000_000) as journal:
        for _ in range(30):
            journal.append([b"x" * 100_000])
        end = journal.end
        journal.append([b"live"])
        journal.drop(end)
        assert journal.records() == [b"live"]
        assert journal.file.stat().st_size < 1_200_000
        journal.append([b"next"])
        assert read_only(journal.file) == ([b"live", b"next"], 0)


def test_a_reader_never_misses_a_record_that_is_moved(tmp_path: Path) -> None:
    with open_at(tmp_path) as journal:
        journal.append([b"stays"])
        ends = threading.Event()

        def work() -> None:
            while not ends.is_set():
                journal.append([b"x" * 500] * 5)
                end = journal.end
                journal.append([b"stays"])
                journal.drop(end)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(300):
                assert b"stays" in read_only(journal.file)[0]
        finally:
            ends.set()
            thread.join()
