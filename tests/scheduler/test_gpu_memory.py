"""After a stop the memory is back before the next start: with an NVML that tells what the test says."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.scheduler.gpu_memory import GpuMemory
from engine.scheduler.launcher import LocalLauncher, Order
from engine.scheduler.nvml import DriverNvml, GpuFacts, NvmlError
from engine.scheduler.units import ProcessRef

from .fake_nvml import FakeNvml
from .support import GIB

REF = ProcessRef(pid=100, started=1, token="t")


class Driver(FakeNvml):
    """Two GPUs; ``then`` is called after each look at what is used."""

    def __init__(self) -> None:
        super().__init__([GpuFacts(i, f"GPU-{i}", "NVIDIA H100", 80 * GIB) for i in range(2)])
        self.looks = 0
        self.then: Callable[[int], None] = lambda looks: None

    def used_bytes(self, index: int) -> int:
        value = super().used_bytes(index)
        self.looks += 1
        self.then(self.looks)
        return value


@pytest.fixture
def driver() -> Driver:
    found = Driver()
    found.used = {0: 50 * GIB, 1: 5 * GIB}
    found.running = {0: {100: 30 * GIB, 101: 10 * GIB, 7: 10 * GIB}, 1: {7: 5 * GIB}}
    return found


def memory(driver: FakeNvml, patience_s: float = 5.0) -> GpuMemory:
    return GpuMemory(driver, patience_s=patience_s, pause_s=0.001)


async def test_it_waits_until_no_process_of_the_group_is_listed(driver: Driver) -> None:
    gpus = memory(driver)
    gpus.stands_on(REF, "0")
    gpus.observe(REF, [100, 101])
    began = driver.looks

    def then(looks: int) -> None:
        if looks == began + 4:
            driver.running[0] = {7: 45 * GIB}  # the neighbour has grown, so the sum tells nothing

    driver.then = then
    await gpus.returned(REF)
    assert driver.looks >= began + 4


async def test_it_waits_until_as_much_less_is_used_though_a_dead_process_is_listed(driver: Driver) -> None:
    gpus = memory(driver)
    gpus.stands_on(REF, "0")
    gpus.observe(REF, [100, 101])
    began = driver.looks

    def then(looks: int) -> None:
        if looks == began + 3:
            driver.used[0] = 10 * GIB + 200 * 2**20

    driver.then = then
    await gpus.returned(REF)
    assert driver.looks == began + 4


async def test_memory_that_does_not_come_back_is_told_and_waited_for_no_longer(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = memory(driver, patience_s=0.02)
    gpus.stands_on(REF, "0,1")
    gpus.observe(REF, [100, 101])
    with caplog.at_level(logging.ERROR):
        await gpus.returned(REF)
    (told,) = caplog.messages
    assert told.startswith("cuda:0 has not got its memory back 0 s after process 100 ended (40.0 GiB")
    assert "nvidia-smi" in told
    caplog.clear()
    await gpus.returned(REF)  # forgotten
    assert not caplog.messages


async def test_processes_that_cannot_be_matched_are_waited_for_until_use_is_steady(driver: Driver) -> None:
    gpus = memory(driver)
    gpus.stands_on(REF, "1")
    gpus.observe(REF, [4000])  # the driver lists other numbers: we are in a container

    def then(looks: int) -> None:
        driver.used[1] = max(GIB, driver.used[1] - GIB)

    driver.then = then
    await gpus.returned(REF)
    assert driver.used[1] == GIB and driver.looks >= 6


async def test_a_group_of_an_earlier_scheduler_is_found_by_its_processes(driver: Driver) -> None:
    gpus = memory(driver, patience_s=0.01)
    gpus.observe(REF, [101])
    began = driver.looks
    await gpus.returned(REF)
    assert driver.looks > began


@pytest.mark.parametrize("visible", ["", "5"])
async def test_a_group_without_gpus_is_not_waited_for(driver: Driver, visible: str) -> None:
    gpus = memory(driver)
    gpus.stands_on(REF, visible)
    gpus.observe(REF, [100])
    await gpus.returned(REF)
    assert driver.looks == 0


async def test_without_a_driver_nothing_is_done(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.error = NvmlError("no driver")
    gpus = memory(driver)
    gpus.stands_on(REF, "0")
    gpus.observe(REF, [100])
    await gpus.returned(REF)
    assert not caplog.records


async def test_a_driver_that_stops_answering_holds_nobody_up(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = memory(driver)
    gpus.stands_on(REF, "0")
    gpus.observe(REF, [100])
    driver.error = NvmlError("GPU is lost")
    await asyncio.wait_for(gpus.returned(REF), 2)
    assert "GPU is lost" in caplog.text


async def test_a_sweep_ends_only_when_the_memory_is_back(driver: Driver, tmp_path: Path) -> None:
    driver.running[0] = {}
    launcher = LocalLauncher(str(tmp_path), memory(driver))
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    ref = launcher.launch(
        Order(
            unit="u",
            argv=argv,
            environment=dict(os.environ),
            folder=tmp_path,
            log=tmp_path / "u.log",
            gpus="0",
        )
    )
    driver.running[0] = {ref.pid: 40 * GIB}
    assert launcher.memory(ref) > 0
    sweep = asyncio.create_task(launcher.sweep(ref, at_once=True))
    await launcher.exited(ref)
    await asyncio.sleep(0.1)
    assert not sweep.done()
    driver.running[0] = {}
    await asyncio.wait_for(sweep, 2)


def test_this_machine_has_no_driver_or_a_true_one() -> None:
    try:
        found = DriverNvml().gpus()
    except NvmlError as error:
        assert str(error)
    else:
        assert all(gpu.memory_bytes > 0 and gpu.uuid for gpu in found)
