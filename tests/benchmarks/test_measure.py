"""What the benchmarks read of processes, held to processes whose use is known."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks._measure import cpu_share, machine, processes_of, pss_bytes

MEGABYTE = 1024**2
#: A shell (the group's leader) with a child that takes 64 MiB and all of a core that it can get.
CHILD = "x = b'1' * (64 * 1024 * 1024)\nprint('go', flush=True)\nwhile True: pass"


@pytest.fixture
def group() -> Iterator[subprocess.Popen[str]]:
    script = f'"{sys.executable}" -c "$1"; exit 0'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", CHILD], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    yield process
    end(process)
    process.stdout.close()


def end(group: subprocess.Popen[str]) -> None:
    for member in processes_of([group.pid]):
        member.kill()
    group.wait()
    limit = time.monotonic() + 10
    while processes_of([group.pid]):  # a killed process takes a moment to end
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_group_has_its_leader_and_children_and_nobody_else(group: subprocess.Popen[str]) -> None:
    found = processes_of([group.pid])
    assert group.pid in {process.pid for process in found}
    assert len(found) == 2
    assert processes_of([]) == []


def test_memory_and_processor_time_of_a_group(group: subprocess.Popen[str]) -> None:
    pids = [process.pid for process in processes_of([group.pid])]
    assert 64 * MEGABYTE < pss_bytes(pids) < 128 * MEGABYTE
    assert 0.02 < cpu_share(pids, 0.3) < 1.2


def test_what_has_ended_takes_nothing(group: subprocess.Popen[str]) -> None:
    pids = [process.pid for process in processes_of([group.pid])]
    end(group)
    assert processes_of([group.pid]) == []
    assert pss_bytes([group.pid]) == 0
    assert cpu_share(pids, 0.01) == 0


def test_the_machine_is_told() -> None:
    told = machine()
    assert told["cpu"] and told["cores"] >= 1 and told["memory_bytes"] > MEGABYTE
