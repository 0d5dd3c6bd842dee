"""How much memory runners may take: of each device, and of the host for weights asleep."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import Config
from engine.planner.hardware import HOST_SHARE
from engine.planner.layout import Policy
from engine.planner.memory import DRIVER_BYTES
from engine.scheduler.devices import CPU, Device

#: Host memory that is nobody's budget: the system, the gateways, the scheduler.
HOST_RESERVE_BYTES = 1 << 30


def rooms(config: Config, devices: Sequence[Device]) -> dict[str, int]:
    """Bytes of each device, by its name, that runners may take together.

    Of the host what ``tiers.cpu_memory_bytes`` says, or all but 1 GiB; of a GPU the planner's share of what
    the driver leaves.
    """
    return {device.name: _room(config, device) for device in devices}


def _room(config: Config, device: Device) -> int:
    if device.is_gpu:
        return max(0, int((device.memory_bytes - DRIVER_BYTES) * Policy().utilisation))
    return config.tiers.cpu_memory_bytes or max(0, device.memory_bytes - HOST_RESERVE_BYTES)


def host_room(config: Config, devices: Sequence[Device]) -> int:
    """Bytes of host memory for the weights of sleeping GPU models: what is configured, or nine tenths."""
    if config.tiers.host_memory_bytes:
        return config.tiers.host_memory_bytes
    return int(sum(device.memory_bytes for device in devices if device.name == CPU) * HOST_SHARE)
