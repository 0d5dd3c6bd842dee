"""The README's code blocks, run in their order as a reader would, and their printed outputs."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import KEY, ROOT

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block and, where one follows, the output that the README shows for it."""

    language: str
    text: str
    output: str | None


def blocks(markdown: str) -> list[Block]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", markdown, re.M | re.S)
    found = []
    for (language, text), after in zip(fences, [*fences[1:], ("", "")], strict=True):
        if language in ("python", "bash"):
            found.append(Block(language, text, after[1] if after[0] == "output" else None))
    return found


def assert_alike(shown: str, printed: str) -> None:
    """The words equal; numbers may differ a little, as another processor rounds otherwise."""
    assert _NUMBER.sub("#", shown).split() == _NUMBER.sub("#", printed).split()
    for one, other in zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True):
        assert float(other) == pytest.approx(float(one), rel=0.02, abs=0.02)


def test_every_block_runs_and_prints_what_is_shown(
    base_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = blocks((ROOT / "README.md").read_text())
    assert len(found) >= 8
    assert sum(block.output is not None for block in found) >= 7
    names: dict[str, Any] = {}
    for block in found:
        text = block.text.replace("/tmp/", f"{tmp_path}/")
        if block.language == "bash":
            run = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=120)
            assert run.returncode == 0, run.stderr
            printed = run.stdout
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, "README.md", "exec"), names)
            printed = out.getvalue()
        if block.output is not None:
            assert_alike(block.output, printed)
