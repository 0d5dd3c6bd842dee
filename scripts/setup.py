"""Makes the virtual environment with every pinned dependency: `make setup`, also run by serve and test.

Runs on a bare Python 3.11 (standard library only). Idempotent: a stamp in the environment holds a digest of
all that decides its content, so a second run returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "audio,embedding,image,detection,gguf,dev"
#: The only package this index is asked for, and only where pip's own index has no CPU build of it.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ((3, 11), (3, 12))


def fail(message: str) -> None:
    """Ends the set-up with a sentence for a person."""
    print(f"setup: {message}", file=sys.stderr)
    raise SystemExit(1)


def has_gpu() -> bool:
    """Whether a working nvidia-smi lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def digest(kind: str) -> str:
    """What the environment's content depends on."""
    found = hashlib.sha256(f"{kind} {sys.version_info[:2]} {ROOT}".encode())
    for name in (f"requirements/{kind}.in", f"requirements/{kind}.txt", "pyproject.toml", "scripts/setup.py"):
        found.update((ROOT / name).read_bytes())
    return found.hexdigest()


def torch_pin(kind: str) -> str:
    """torch's pinned version."""
    for line in (ROOT / f"requirements/{kind}.txt").read_text().splitlines():
        if line.startswith("torch=="):
            return line.removeprefix("torch==")
    fail(f"requirements/{kind}.txt names no torch; run `make lock`.")
    raise AssertionError


def pip(python: Path, *args: str, heard: bool = True) -> bool:
    """Runs the environment's pip, which speaks only of errors; whether it succeeded."""
    command = [str(python), "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check", *args]
    return subprocess.run(command, stderr=None if heard else subprocess.DEVNULL).returncode == 0


def step(text: str) -> None:
    """Tells what is done now; pip itself is silent."""
    print(f"setup: {text}", flush=True)


def make_environment(venv: Path) -> Path:
    """A fresh virtual environment; its Python."""
    if sys.version_info[:2] not in PYTHONS:
        have = ".".join(map(str, sys.version_info[:2]))
        fail(
            f"Python 3.11 or 3.12 is needed and this is {have}. Try `make PYTHON=/path/to/python3.11 serve`."
        )
    shutil.rmtree(venv, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)])
    if made.returncode != 0:
        fail("`python -m venv` failed. On Debian or Ubuntu install it: `apt-get install python3-venv`.")
    return venv / "bin" / "python"


def install_torch_cpu(python: Path, version: str) -> None:
    """The CPU build of torch: from pip's configured index or, failing that, from PyTorch's own."""
    wanted = f"torch=={version}+cpu"
    step(f"{wanted} (the CPU build)")
    if pip(python, "--no-deps", wanted, heard=False):
        return
    step(f"pip's own index has no {wanted}; asking PyTorch's CPU index for it")
    if not pip(python, "--no-deps", "--index-url", TORCH_CPU_INDEX, wanted):
        fail(f"{wanted} could not be had from either index. Set PIP_FIND_LINKS to a folder with its wheel.")


def install(python: Path, kind: str) -> None:
    """Every pinned package, and Hearth itself in place (editable)."""
    constraint = ["--constraint", str(ROOT / f"requirements/{kind}.txt")]
    # The build tools first: an isolated build of Hearth itself would fetch them again, unpinned.
    if not pip(python, *constraint, "setuptools", "wheel"):
        fail("pip could not install setuptools; its own words stand above. Is a package index reachable?")
    if kind == "cpu":
        install_torch_cpu(python, torch_pin(kind))
    # Metadata that an older build left here comes before the installed one on a runner's path, and would hide
    # entry points added since.
    shutil.rmtree(ROOT / "hearth.egg-info", ignore_errors=True)
    pinned = (ROOT / f"requirements/{kind}.txt").read_text().count("==")
    step(f"{pinned} pinned packages; this takes a few minutes")
    needed = ["--requirement", str(ROOT / f"requirements/{kind}.in"), "--editable", f"{ROOT}[{EXTRAS}]"]
    # ultralytics asks for opencv-python, which needs a desktop's libraries (libGL, libxcb); the headless
    # build has the same module without them, and wins by being written last.
    headless = ["--force-reinstall", "--no-deps", "opencv-python-headless"]
    for packages in (["--no-build-isolation", *needed], headless):
        if not pip(python, *constraint, *packages):
            fail(
                "pip could not install the dependencies; its own words stand above. Mend that, run it again."
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--set", choices=["auto", "cpu", "gpu"], default=os.environ.get("HEARTH_SET", "auto"))
    options = parser.parse_args()
    kind = options.set if options.set != "auto" else ("gpu" if has_gpu() else "cpu")
    stamp = options.venv / ".hearth-setup"
    wanted = digest(kind)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    free = shutil.disk_usage(ROOT).free
    if free < 8e9:
        fail(f"the dependencies take about 5 GB (8 GB while installing); {free / 1e9:.1f} GB are free.")
    began = time.monotonic()
    step(f"the {kind} dependency set goes into {options.venv}: about 5 GB, once")
    python = make_environment(options.venv)
    install(python, kind)
    stamp.write_text(wanted)
    step(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
