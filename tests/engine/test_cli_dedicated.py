"""What tenants own, as the command line shows it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from engine.cli import tables
from engine.cli.serve import Screen, unknown_owners
from engine.config import Config
from engine.metering import tenants
from engine.metering.opening import opened
from engine.scheduler.status import Status

from .test_cli import printed, run, status

OWNED_REPLICAS = """
[dedicated.acme]
models = { "all-minilm-l6-v2" = 2 }
spill_over = true
"""
OWNED_GPU = """
[dedicated.zorg]
models = { "whisper-large-v3" = 1 }
gpus = [7]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a person; its hearth.toml is read."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def owned() -> Status:
    shared, own = status(), status("backoff", owner="acme", spill_over=True, reason="exit status 1")
    return shared.model_copy(update={"models": [*shared.models, *own.models]})


def test_the_table_has_owners_where_there_are_any() -> None:
    lines = printed(tables.models(owned())).splitlines()
    assert lines[0].split()[:3] == ["runner", "owner", "category"]
    assert lines[1].split()[:3] == ["tiny", "shared", "embedding"]
    assert lines[2].split()[:4] == ["tiny", "acme", "embedding", "backoff"]
    assert "exit status 1; spill-over" in lines[2]
    assert "owner" not in printed(tables.models(status()))


def test_plain_lines_say_whose_replica_it_is() -> None:
    out = io.StringIO()
    Screen(Console(file=out, width=160), "key", live=False).show(owned())
    assert "tiny: ready" in out.getvalue() and "tiny of acme: backoff (exit status 1" in out.getvalue()


def test_a_cpu_profile_is_planned_with_its_owners(folder: Path) -> None:
    (folder / "hearth.toml").write_text(OWNED_REPLICAS)
    code, text = run("plan", "--profile", "tiny")
    assert code == 0, text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["all-minilm-l6-v2-0"][:2] == ["shared", "resident"]
    assert rows["all-minilm-l6-v2@acme-1"][:2] == ["acme", "resident"]
    assert "of" in rows["cpu:0:"]
    code, text = run("plan", "--profile", "tiny", "--json")
    found = json.loads(text)
    (own, *_) = [each for each in found["placements"] if each["owner"]]
    assert (own["id"], own["owner"], own["spill_over"]) == ("all-minilm-l6-v2@acme-0", "acme", True)
    assert found["devices"][0]["held_bytes"] >= sum(each["awake_bytes"] for each in found["placements"])


def test_owned_gpus_are_marked_and_hold_nobody_else(folder: Path) -> None:
    (folder / "hearth.toml").write_text(OWNED_GPU)
    code, text = run("plan", "--profile", "gpu-h200", "--nodes", "1x8xH200")
    assert code == 0, text
    (line,) = [line for line in text.splitlines() if "zorg's alone" in line]
    assert "gpu7" in line
    assert "whisper-large-v3@zorg-0" in text and "dedicated to zorg, on GPUs of its own" in text
    code, text = run("plan", "--profile", "gpu-h200", "--nodes", "1x8xH200", "--json")
    found = json.loads(text)
    assert found["nodes"][0]["gpu_owners"] == [None] * 7 + ["zorg"]
    on_seven = [each["owner"] for each in found["placements"] if 7 in each["gpus"][0]["gpus"]]
    assert on_seven == ["zorg"]
    code, text = run("plan", "--profile", "gpu-h200", "--nodes", "1x4xH200")
    assert code == 1 and "[dedicated.zorg]: GPU 7 is not there; there are GPUs 0, 1, 2, 3" in text


async def test_an_owner_that_is_no_tenant_is_told(tmp_path: Path) -> None:
    config = Config(
        state_dir=tmp_path, dedicated={"acme": {"models": {"m": 1}}, "acne": {"models": {"m": 1}}}
    )
    async with opened(config) as database:
        made = await tenants.create(database, "acme")
    (told,) = await unknown_owners(config)
    assert told.startswith("[dedicated] acne: there is no tenant") and "Did you mean 'acme'" in told
    by_id = Config(state_dir=tmp_path, dedicated={made.id: {"models": {"m": 1}}})
    assert await unknown_owners(by_id) == []
