"""The environment variables of a runner process: pure."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from engine.runners import expert_load, scratch
from engine.runners.spec import RunnerSpec

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM = Path(__file__).resolve().parent / "shim"

#: Largest picture that a vLLM runner decodes; the gateway's `fetch.max_pixels` has the same default.
MAX_PIXELS = 50_000_000
#: Never a call home, never a model hub: a runner gets a folder with everything in it.
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    "WANDB_DISABLED": "true",
}
#: Secrets and settings of the parent that a runner has no use for.
_DROPPED = ("HEARTH_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "_HEARTH_", "VLLM_SERVER_DEV_MODE")


def runner_environment(spec: RunnerSpec, base: Mapping[str, str]) -> dict[str, str]:
    """The environment for a runner of ``spec``.

    Args:
        spec: what the runner serves; its threads and device matter here.
        base: the environment to start from, usually ``os.environ``. Kept, except for Hearth's own variables
            and hub tokens.

    The folder of ``sitecustomize.py`` and the repository come first on ``PYTHONPATH``. Cache folders stay as
    they are; a vLLM runner gets a temporary folder of its own. ``CUDA_VISIBLE_DEVICES`` is set from the
    device, so that "cuda:2,3" sees those two and a CPU runner none.
    """
    env = {key: value for key, value in base.items() if not key.startswith(_DROPPED)}
    paths = [str(SHIM), str(ROOT), *(p for p in base.get("PYTHONPATH", "").split(os.pathsep) if p)]
    threads = str(spec.threads)
    env |= _QUIET | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        # Tokenisers start a thread a core otherwise, and warn about forks.
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": visible_devices(spec.device),
        # As the driver numbers them, by which the plan goes; CUDA itself would put the fastest first.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # joblib would make a semaphore in shared memory at its import, only to see whether it can.
        "JOBLIB_MULTIPROCESSING": "0",
        scratch.SHM_VARIABLE: scratch.shm_prefix(spec.socket),
    }
    # A thread that waits for work sleeps instead of spinning: several runners share the cores.
    env |= {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    if spec.engine == "vllm":
        env |= _vllm(spec)
    return env


def ensure_environment(spec: RunnerSpec) -> None:
    """Starts this process anew in the runner's environment where it lacks it, as one started by hand does."""
    if str(SHIM) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], runner_environment(spec, os.environ))


def repair_imports() -> None:
    """Does in this process what the shim does at the start of a runner's: see ``shim/sitecustomize.py``."""
    if str(SHIM) in sys.path:
        return
    spec = importlib.util.spec_from_file_location("hearth_import_repairs", SHIM / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


def visible_devices(device: str) -> str:
    """``CUDA_VISIBLE_DEVICES`` of a device name: '2,3' for 'cuda:2,3', '' for 'cpu:0'."""
    kind, _, numbers = device.partition(":")
    return (numbers or "0") if kind == "cuda" else ""


def _eager(spec: RunnerSpec) -> bool:
    table = spec.options.get("args", {})
    return bool(table.get("enforce-eager", table.get("enforce_eager", False)))


def _vllm(spec: RunnerSpec) -> dict[str, str]:
    env = {
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # Sockets and rendezvous files of its processes, which a killed one leaves behind.
        "VLLM_RPC_BASE_PATH": str(scratch.folder_of(spec.socket)),
        "TMPDIR": str(scratch.folder_of(spec.socket)),
        "VLLM_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
        # Read by our plugins for mixtures of experts; nothing is written for other models.
        expert_load.VARIABLE: str(expert_load.path_of(spec.socket)),
    }
    if spec.can_sleep and spec.device.startswith("cuda"):
        # Brings the routes for sleeping, and others that `vllm_gate` lets nobody through to.
        env["VLLM_SERVER_DEV_MODE"] = "1"
    if spec.device.startswith("cpu"):
        # Unbound: several servers share the same cores, and binding would pin all of them to the first ones.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # The ranks of a replica meet on this machine only, whatever its host name resolves to.
        env |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        # Then workers that do not leave by themselves get SIGTERM; no GPU memory has to be given back.
        env["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "1"
        if _eager(spec):
            # Else the first request for logprobs compiles a helper: twenty seconds on a small machine.
            env["TORCH_COMPILE_DISABLE"] = "1"
    return env
