"""Runs at the start of every Python process of a runner, vLLM's children included.

The folder is on the runner's PYTHONPATH. Repairs, all idle where they are not needed:

- **torchvision** from the package index is a CUDA build. Beside a CPU torch its compiled part does not load,
  and its import dies because the schemas of ``torchvision::nms`` and ``torchvision::qnms`` do not exist. When
  torchvision is first imported and its compiled part cannot be loaded, the schemas are defined first; only
  calling such an op fails then. With a torchvision that loads nothing happens.
- **torchaudio** and **torchcodec** are CUDA builds too, and libraries import them wherever they are found.
  Nothing here needs them: beside a CPU torch, those linked to CUDA are made to look absent.
- **shared memory** and semaphores get names that begin with ``_HEARTH_SHM``, so that what a killed process
  leaves can be found (``engine/runners/scratch.py``). vLLM's ranks on a CPU share memory past Python: their
  group's name gets the same beginning.
- **orphans**: vLLM's engine processes outlive an API server that is killed. A process that finds its group's
  leader in ``_HEARTH_LEADER`` ("PID:START TIME") ends itself when the leader is gone.

Standard library only, and any other ``sitecustomize`` further down the path is run too.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - before pathlib is worth its cost
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
#: Libraries must be kept: their definitions go when they are collected.
_kept: list[Any] = []


class _RepairingFinder(MetaPathFinder):
    """Finds the modules that have a repair as usual, with a loader that repairs them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _BEFORE and fullname not in _AFTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RepairingLoader(spec.loader)
        return spec


class _RepairingLoader(Loader):
    """Another loader, with a repair before or after the module runs."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        if before := _BEFORE.get(module.__name__):
            before(module)
        self._inner.exec_module(module)
        if after := _AFTER.get(module.__name__):
            after(module)


def _repair_torchvision(module: ModuleType) -> None:
    define_missing_schemas(module.__path__)


def _name_rank_memory(module: ModuleType) -> None:
    """Lets the names of the memory that vLLM's ranks on a CPU share begin with ``_HEARTH_SHM``."""
    prefix = os.environ.get("_HEARTH_SHM", "")
    distributed: Any = getattr(module, "_CPUSHMDistributed", None)
    # Undocumented: where a later vLLM has no such class or method, its own names are used.
    if prefix and hasattr(distributed, "make_group_name"):
        own: Callable[[Any], str] = distributed.make_group_name
        distributed.make_group_name = staticmethod(lambda communicator: prefix + own(communicator))


_BEFORE: dict[str, Callable[[ModuleType], None]] = {"torchvision": _repair_torchvision}
_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "vllm.distributed.device_communicators.cpu_communicator": _name_rank_memory
}


def define_missing_schemas(folders: Sequence[str]) -> bool:
    """Defines torchvision's schemas whose compiled part (``_C.so`` in one of ``folders``) cannot be loaded.

    Returns whether it defined any.
    """
    import torch

    # torch's own annotations are incomplete here.
    load: Any = torch.ops.load_library
    library_class: Any = torch.library.Library
    if torch.version.cuda is not None or getattr(torch.version, "hip", None) is not None:
        return False
    for folder in folders:
        for library in (*Path(folder).glob("_C.so"), *Path(folder).glob("_C.*.so")):
            try:
                load(str(library))
            except OSError:
                continue
            return False
    definitions = library_class("torchvision", "DEF")
    for schema in _SCHEMAS:
        definitions.define(schema)
    _kept.append(definitions)
    return True


def hide_cuda_builds(names: Sequence[str]) -> list[str]:
    """Makes those of ``names`` look absent that are linked to CUDA while torch is not; returns them."""
    folder = _folder("torch")
    version = folder / "version.py" if folder else None
    if version is None or not version.exists() or "cuda: Optional[str] = None" not in version.read_text():
        return []
    hidden = []
    for name in names:
        package = _folder(name)
        if name not in sys.modules and package is not None and any(map(_needs_cuda, package.rglob("*.so"))):
            # None makes `import` and importlib's find_spec alike say that there is no such module.
            sys.modules[name] = None  # type: ignore[assignment]  # documented, though typeshed does not know it
            hidden.append(name)
    return hidden


def _folder(package: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = PathFinder.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _needs_cuda(library: Path) -> bool:
    data = library.read_bytes()
    return b"libc10_cuda.so" in data or b"libtorch_cuda.so" in data or b"libcudart.so" in data


def start_time(pid: int) -> str | None:
    """The kernel's start time of a process (clock ticks after boot); None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _name_shared_memory() -> None:
    prefix = os.environ.get("_HEARTH_SHM")
    if not prefix:
        return
    from multiprocessing import process, shared_memory

    # No name here is documented; where a later Python has others, the default names are used again.
    settings: Any = shared_memory
    settings._SHM_NAME_PREFIX = f"/{prefix}"
    settings._SHM_SAFE_NAME_LENGTH = len(prefix) + 12
    current: Any = process.current_process()
    current._config["semprefix"] = f"/{prefix}s"


def _follow_leader() -> None:
    name, _, started = os.environ.get("_HEARTH_LEADER", "").partition(":")
    if not name or int(name) == os.getpid():
        return
    threading.Thread(target=_end_after, args=(int(name), started), name="leader-watch", daemon=True).start()


def _end_after(leader: int, started: str) -> None:
    try:
        handle = os.pidfd_open(leader)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    except OSError:  # a kernel or sandbox without pidfd_open: look once a second
        while start_time(leader) == started:
            time.sleep(1.0)
    else:
        import select

        # The number may have been given to another process before it was opened.
        if start_time(leader) == started:
            select.select([handle], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def _run_next_sitecustomize() -> None:
    """Runs the ``sitecustomize`` that this one hides, if there is any."""
    path = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]  # noqa: PTH100 - as above
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def install() -> None:
    """Repairs the imports of this process; a second call does nothing."""
    if not any(isinstance(finder, _RepairingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RepairingFinder())
        hide_cuda_builds(("torchaudio", "torchcodec"))


if __name__ == "sitecustomize":
    install()
    _name_shared_memory()
    _follow_leader()
    _run_next_sitecustomize()
