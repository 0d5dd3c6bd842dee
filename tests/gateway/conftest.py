"""The gateway's tests run against sockets, in one event loop, without engines."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from engine.config import Config
from tests.gateway.dummy import DummyRunner, House, open_house, route
from tests.gateway.scheduler import FakeScheduler


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="hg-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture
async def runner(short: Path) -> AsyncIterator[DummyRunner]:
    dummy = DummyRunner(short / "a.sock")
    await dummy.start()
    yield dummy
    await dummy.stop()


@pytest.fixture
async def second(short: Path) -> AsyncIterator[DummyRunner]:
    dummy = DummyRunner(short / "b.sock", name="second")
    await dummy.start()
    yield dummy
    await dummy.stop()


@pytest.fixture
async def house(short: Path, tmp_path: Path, runner: DummyRunner) -> AsyncIterator[House]:
    async with open_house(tmp_path, route("dummy", runner)) as opened:
        yield opened


@pytest.fixture
async def scheduler(short: Path, tmp_path: Path) -> AsyncIterator[FakeScheduler]:
    """The control socket of the house whose state folder is tmp_path."""
    fake = FakeScheduler(Config(state_dir=tmp_path).control_socket)
    await fake.start()
    yield fake
    await fake.stop()
