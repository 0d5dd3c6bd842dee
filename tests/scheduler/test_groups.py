"""Processes as the kernel shows them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.scheduler import groups
from engine.scheduler.units import ProcessRef

TOKEN = "hearth-test/unit/0"
SLEEP = "import time; time.sleep(600)"
#: Starts a child that sleeps, one that sleeps in a session of its own, and one without our environment.
FAMILY = f"""
import os, subprocess, sys
for options in ({{}}, {{"start_new_session": True}}, {{"env": {{}}}}):
    subprocess.Popen([sys.executable, "-S", "-c", {SLEEP!r}], **options)
print("up", flush=True)
{SLEEP}
"""


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[bytes], ProcessRef]]:
    leader = subprocess.Popen(
        [sys.executable, "-S", "-c", FAMILY],
        env=os.environ | {groups.TOKEN_VARIABLE: TOKEN},
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert leader.stdout and leader.stdout.readline() == b"up\n"
    ref = groups.refer(leader.pid, TOKEN)
    assert ref
    everyone = groups.members(ref)
    try:
        yield leader, ref
    finally:
        groups.signal_each({*everyone, *groups.with_token(lambda token: token == TOKEN)}, signal.SIGKILL)
        leader.wait()
        leader.stdout.close()


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any((seen := groups.see(pid)) and seen.lives for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_all_that_a_leader_started_is_found_wherever_it_went(
    family: tuple[subprocess.Popen[bytes], ProcessRef],
) -> None:
    leader, ref = family
    found = groups.members(ref)
    assert len(found) == 4 and leader.pid in found
    assert groups.memory_of(found) > 4 * 500_000
    leader.kill()
    # As long as it is not reaped its session is known to be its own: all three children are still found.
    assert gone([leader.pid]) and len(groups.members(ref)) == 3
    leader.wait()
    # Afterwards only the token tells.
    assert len(groups.members(ref)) == 2
    groups.signal_each(found, signal.SIGKILL)
    assert gone(found) and groups.members(ref) == []


def test_a_number_with_another_start_is_another_process(
    family: tuple[subprocess.Popen[bytes], ProcessRef],
) -> None:
    _, ref = family
    stale = replace(ref, started=ref.started - 1, token="hearth-test/other/1")
    assert groups.lives(ref) and not groups.lives(stale)
    assert groups.members(stale) == []
    assert not groups.signal_leader(stale, signal.SIGKILL)
    assert groups.lives(ref)


def test_a_zombie_does_not_live() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ref = groups.refer(child.pid, "t")
    assert ref and gone([child.pid])
    seen = groups.see(child.pid)
    assert seen and not seen.lives and not groups.lives(ref)
    child.wait()
    assert groups.see(child.pid) is None and groups.refer(child.pid, "t") is None


def test_names_with_brackets_and_spaces_are_read_rightly() -> None:
    code = f"import sys; open('/proc/self/comm', 'w').write('a) R (b'); print('up', flush=True); {SLEEP}"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout and child.stdout.readline()
        seen = groups.see(child.pid)
        assert seen and seen.session == os.getsid(child.pid) and seen.group == os.getpgid(child.pid)
    finally:
        child.kill()
        child.communicate()
