"""The GPUs that a plan stands on: kinds, nodes, and how they are joined."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import nearest

MIB = 2**20
GIB = 2**30
#: Share of the host's memory that the weights of sleeping models may take: it is pinned, so none of it can be
#: reclaimed, and runners, gateways and the page cache need theirs.
HOST_SHARE = 0.9


class NodesError(ValueError):
    """A description of nodes cannot be read; the message names the part, the reason and the next step."""


@dataclass(frozen=True)
class GpuKind:
    """One model of GPU."""

    name: str
    #: As ``nvidia-smi`` reports it, bytes; the driver's own share is counted as a cost of each GPU.
    memory_bytes: int
    #: CUDA compute capability, (major, minor).
    capability: tuple[int, int]
    #: Joined by NVLink inside a node; else by PCIe.
    nvlink: bool
    #: Host memory for each GPU that machines with this kind usually have, bytes.
    host_bytes: int = 0


def _kind(name: str, mib: int, capability: tuple[int, int], nvlink: bool, host_gib: int) -> GpuKind:
    return GpuKind(name, mib * MIB, capability, nvlink, host_gib * GIB)


#: Memory in MiB as ``nvidia-smi`` shows it; host memory in GiB for each GPU, as machines to rent have it
#: (2048 GiB beside eight B200, H200 or H100; 1024 beside eight H20; 1152 beside eight A100; 384 beside four
#: L40S; 192 beside four L4 or A10), and 64 for a workstation with an RTX 4090.
KINDS: dict[str, GpuKind] = {
    kind.name: kind
    for kind in (
        _kind("B200", 183_359, (10, 0), True, 256),
        _kind("H200", 143_771, (9, 0), True, 256),
        _kind("H100", 81_559, (9, 0), True, 256),
        _kind("H20", 97_871, (9, 0), True, 128),
        _kind("A100-80", 81_920, (8, 0), True, 144),
        _kind("A100-40", 40_960, (8, 0), True, 144),
        _kind("L40S", 46_068, (8, 9), False, 96),
        _kind("L4", 23_034, (8, 9), False, 48),
        _kind("A10", 23_028, (8, 6), False, 48),
        _kind("RTX4090", 24_564, (8, 9), False, 64),
    )
}
_FORM = re.compile(r"\s*(\d+)\s*x\s*(\d+)\s*x\s*([^:]+?)\s*(?::\s*(\d+)\s*(?:GiB)?\s*)?", re.IGNORECASE)
#: Largest number of GPUs and nodes that a description may ask for.
_MOST = 100_000


@dataclass(frozen=True)
class Node:
    """One machine with equal GPUs."""

    name: str
    kind: GpuKind
    gpus: int
    #: GPUs talk to other nodes' over RDMA (InfiniBand, RoCE); else over plain Ethernet.
    rdma: bool = True
    #: Host memory that the weights of sleeping models may take, bytes; None = of what is usual for the kind.
    host_room: int | None = None

    @property
    def host_bytes(self) -> int:
        """Host memory that the weights of sleeping models may take."""
        if self.host_room is not None:
            return self.host_room
        return int(self.kind.host_bytes * self.gpus * HOST_SHARE)


def find_kind(name: str) -> GpuKind:
    """The GPU kind of this name; case, spaces, dashes and underscores do not matter, nor "80GB" of an H100.

    Raises:
        NodesError: no such kind; the message gives the nearest.
    """

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]|gb$", "", text.lower())

    aliases = {"h10080": "H100", "h200141": "H200", "a100": "A100-80", "4090": "RTX4090"}
    by_plain = {plain(kind): kind for kind in KINDS} | aliases
    found = by_plain.get(plain(name))
    if found is None:
        close = nearest(plain(name), by_plain, most=1)
        hint = f"Did you mean {by_plain[close[0]]}?" if close else f"Known: {', '.join(KINDS)}."
        raise NodesError(f"there is no GPU kind '{name}'. {hint}")
    return KINDS[found]


def parse_nodes(text: str, *, rdma: bool | None = None) -> list[Node]:
    """Nodes from ``NODESxGPUSxKIND[:HOSTGiB]``, joined by commas: "2x8xH200,1x4xL40S:512".

    Args:
        text: the description.
        rdma: whether nodes reach each other over RDMA; None = those with NVLink do.

    Raises:
        NodesError: a part has another form, a number is not positive, or the kind is unknown.
    """
    nodes: list[Node] = []
    for part in text.replace("\u00d7", "x").split(","):
        match = _FORM.fullmatch(part)
        if match is None:
            raise NodesError(
                f"'{part.strip()}' does not describe nodes. Write NODESxGPUSxKIND, for example 1x8xH200, "
                "and :GiB behind it where the host's memory is not the usual: 1x8xH200:1024."
            )
        count, gpus, kind = int(match[1]), int(match[2]), find_kind(match[3])
        if not 0 < count * gpus <= _MOST:
            raise NodesError(f"'{part.strip()}': nodes and GPUs are at least 1 and {_MOST} in all.")
        reach = kind.nvlink if rdma is None else rdma
        host = int(int(match[4]) * GIB * HOST_SHARE) if match[4] else None
        nodes += [Node(f"n{len(nodes) + i}", kind, gpus, reach, host) for i in range(count)]
    return nodes
