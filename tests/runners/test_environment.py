"""The environment of a runner process, and the repairs that run at its start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.runners.environment import SHIM, runner_environment, visible_devices
from engine.runners.spec import RunnerSpec


def make_spec(**fields: Any) -> RunnerSpec:
    base: dict[str, Any] = {
        "model": "m",
        "category": "chat",
        "engine": "vllm",
        "model_dir": "/m",
        "socket": "/s",
    }
    return RunnerSpec(**{**base, **fields})


def test_threads_and_devices_come_from_the_spec() -> None:
    env = runner_environment(make_spec(threads=3, device="cuda:1,2"), {"PATH": "/bin"})
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3"
    assert env["CUDA_VISIBLE_DEVICES"] == "1,2" and env["PATH"] == "/bin"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in env and "TORCH_COMPILE_DISABLE" not in env
    assert [visible_devices(d) for d in ("cpu:0", "cuda", "cuda:3")] == ["", "0", "3"]


def test_a_runner_on_cpu_sees_no_gpu_and_compiles_nothing_when_eager() -> None:
    spec = make_spec(options={"args": {"enforce_eager": True}})
    env = runner_environment(spec, {"CUDA_VISIBLE_DEVICES": "0"})
    assert env["CUDA_VISIBLE_DEVICES"] == "" and env["TORCH_COMPILE_DISABLE"] == "1"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert env["VLLM_HOST_IP"] == "127.0.0.1" and env["GLOO_SOCKET_IFNAME"] == "lo"
    assert "VLLM_LOGGING_LEVEL" not in runner_environment(make_spec(engine="diffusers"), {})


def test_vllms_routes_for_developers_are_on_only_where_it_sleeps_on_a_gpu() -> None:
    name, base = "VLLM_SERVER_DEV_MODE", {"VLLM_SERVER_DEV_MODE": "1"}
    assert runner_environment(make_spec(device="cuda:0", can_sleep=True), {})[name] == "1"
    for spec in (
        make_spec(device="cuda:0"),
        make_spec(can_sleep=True),
        make_spec(engine="diffusers", device="cuda:0", can_sleep=True),
    ):
        assert name not in runner_environment(spec, base)


def test_no_secret_of_the_parent_and_no_hub_reaches_a_runner() -> None:
    base = {"HEARTH_API_KEY": "secret", "HF_TOKEN": "secret", "_HEARTH_LEADER": "1:1", "HF_HUB_OFFLINE": "0"}
    env = runner_environment(make_spec(), base)
    assert not env.keys() & (base.keys() - {"HF_HUB_OFFLINE"}) and "secret" not in env.values()
    assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == env["DO_NOT_TRACK"] == "1"


def test_the_shim_comes_first_and_others_paths_stay() -> None:
    env = runner_environment(make_spec(), {"PYTHONPATH": f"/other{os.pathsep}{SHIM}"})
    first, root, *rest = env["PYTHONPATH"].split(os.pathsep)
    assert first == str(SHIM) and (Path(root) / "engine").is_dir() and rest == ["/other"]


def python(code: str, *paths: Path | str, **env: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(str(p) for p in paths)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(code: str, *paths: Path | str, **env: str) -> str:
    process = python(code, *paths, **env)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    return text.strip()


FAKE_TORCH = """
import types
version = types.SimpleNamespace(cuda={cuda!r}, hip=None)
defined = []
class Library:
    def __init__(self, name, kind): self.name = name
    def define(self, schema): defined.append(self.name + "::" + schema.partition("(")[0])
library = types.SimpleNamespace(Library=Library)
class ops:
    @staticmethod
    def load_library(path):
        if {broken!r}: raise OSError("libc10_cuda.so: cannot open shared object file")
"""


def fake_packages(folder: Path, *, cuda: str | None, broken: bool) -> Path:
    """A torch, a torchvision and a torchaudio that are nothing but what the shim looks at."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(FAKE_TORCH.format(cuda=cuda, broken=broken))
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\n"
    )
    for name in ("torchvision", "torchaudio"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("import torch\nseen = list(torch.defined)\n")
        (folder / name / "_C.so").write_bytes(b"...libc10_cuda.so..." if broken else b"...libc10.so...")
    return folder


SEEN = "import torchvision; print(torchvision.seen)"
FINDS_AUDIO = "import importlib.util; print(importlib.util.find_spec('torchaudio') is not None)"


def test_schemas_are_defined_before_a_torchvision_that_cannot_load(tmp_path: Path) -> None:
    packages = fake_packages(tmp_path, cuda=None, broken=True)
    assert output(SEEN, SHIM, packages) == "['torchvision::nms', 'torchvision::qnms']"
    assert output(FINDS_AUDIO, SHIM, packages) == "False"


@pytest.mark.parametrize(("cuda", "broken"), [(None, False), ("13.0", True), ("13.0", False)])
def test_nothing_is_done_where_the_builds_fit(tmp_path: Path, cuda: str | None, broken: bool) -> None:
    packages = fake_packages(tmp_path, cuda=cuda, broken=broken)
    assert output(SEEN, SHIM, packages) == "[]"
    assert output(FINDS_AUDIO, SHIM, packages) == "True"


def test_finding_torchvision_does_not_import_torch(tmp_path: Path) -> None:
    packages = fake_packages(tmp_path, cuda=None, broken=True)
    code = (
        "import importlib.util, sys; importlib.util.find_spec('torchvision'); print('torch' in sys.modules)"
    )
    assert output(code, SHIM, packages) == "False"


FAKE_COMMUNICATOR = """
class _CPUSHMDistributed:
    @staticmethod
    def make_group_name(communicator): return f"vllm_dist_1-{communicator}"
    def __init__(self, communicator): self.name = self.make_group_name(communicator)
"""


def test_memory_that_ranks_share_is_named_after_the_runner(tmp_path: Path) -> None:
    folder = tmp_path / "vllm" / "distributed" / "device_communicators"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "cpu_communicator.py").write_text(FAKE_COMMUNICATOR)
    code = (
        "from vllm.distributed.device_communicators import cpu_communicator as c;"
        "print(c._CPUSHMDistributed('tp').name)"
    )
    assert output(code, SHIM, tmp_path, _HEARTH_SHM="hearth-a-b-") == "hearth-a-b-vllm_dist_1-tp"
    assert output(code, SHIM, tmp_path, _HEARTH_SHM="") == "vllm_dist_1-tp"


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.other_ran = True\n")
    assert output("print(other_ran)", SHIM, tmp_path) == "True"


@pytest.mark.engines
def test_the_real_libraries_import_beside_the_installed_torch() -> None:
    code = "import torchvision.ops, transformers.image_utils, transformers.audio_utils; print('imported')"
    assert output(code, SHIM, HF_HUB_OFFLINE="1").endswith("imported")


def started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


WAITS = "import sys; print('up', flush=True); sys.stdin.read()"


def test_a_process_ends_when_its_leader_is_killed() -> None:
    leader = python(WAITS)
    follower = python(WAITS, SHIM, _HEARTH_LEADER=f"{leader.pid}:{started(leader.pid)}")
    try:
        assert follower.stdout is not None and follower.stdout.readline() == "up\n"
        assert follower.poll() is None
        leader.kill()
        leader.wait(10)
        assert follower.wait(10) == -signal.SIGKILL
    finally:
        for process in (leader, follower):
            process.kill()
            process.communicate()


def test_a_process_whose_leader_is_gone_already_or_another_ends_at_once() -> None:
    gone = python("pass")
    gone.communicate(timeout=30)
    for leader in (f"{gone.pid}:1", f"{os.getpid()}:1"):
        follower = python("import time; time.sleep(30)", SHIM, _HEARTH_LEADER=leader)
        began = time.monotonic()
        follower.communicate(timeout=20)
        assert follower.returncode == -signal.SIGKILL and time.monotonic() - began < 15


def test_the_leader_itself_goes_on() -> None:
    code = "import os; os.execve(sys.executable, [sys.executable, '-c', 'print(1)'], {**os.environ, **new})"
    setup = "import sys, pathlib; pid = str(__import__('os').getpid()); "
    setup += "new = {'_HEARTH_LEADER': pid + ':' + pathlib.Path('/proc/self/stat').read_text().split()[21]}; "
    assert output(setup + code, SHIM) == "1"
