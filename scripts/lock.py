"""Pins every version: `make lock` writes requirements/cpu.txt and requirements/gpu.txt, the constraint files.

Nothing is installed: pip only resolves. Where the two sets differ in a package that both have, it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
EXTRAS = "audio,embedding,image,detection,gguf,dev"
#: Pinned although nothing names them: the build of this package itself needs them.
BUILD = ("setuptools<80", "wheel")


def resolve(kind: str) -> dict[str, str]:
    """Name -> version of everything that the set needs, without local version parts ('+cpu')."""
    environment = dict(os.environ)
    if kind == "gpu":
        # A folder of CPU wheels that pip is configured with must not stand in for the CUDA build.
        environment.pop("PIP_FIND_LINKS", None)
        environment["PIP_CONFIG_FILE"] = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "--requirement", str(REQUIREMENTS / f"{kind}.in")]
        subprocess.run([*command, f"{ROOT}[{EXTRAS}]", *BUILD], check=True, env=environment)
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
    parser.add_argument("--only", choices=["cpu", "gpu"], help="resolve one set; default: both")
    only = parser.parse_args().only
    chosen = [only] if only else ["cpu", "gpu"]
    pinned = {kind: resolve(kind) for kind in chosen}
    for kind, packages in pinned.items():
        write(kind, packages)
    if len(pinned) == 2:
        cpu, gpu = pinned["cpu"], pinned["gpu"]
        for name in sorted(cpu.keys() & gpu.keys()):
            if cpu[name] != gpu[name]:
                print(f"  {name}: {cpu[name]} in the cpu set, {gpu[name]} in the gpu set")


if __name__ == "__main__":
    main()
