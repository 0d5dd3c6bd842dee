"""`hearth moe balance`: what it prints, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.cli import control
from engine.cli.app import app
from engine.config import Config
from engine.runners import expert_load
from engine.scheduler.plan import socket_path
from engine.scheduler.status import ModelStatus, SchedulerStatus, Status, UnitStatus
from tests.runners.test_expert_load import write

LOADS = [[60, 20, 20, 20], [10, 10, 10, 10]]


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["moe", "balance", *words])
    return result.exit_code, result.output


@pytest.fixture
def loads(tmp_path: Path) -> str:
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(LOADS))
    return str(file)


def test_linear_and_rebalanced_stand_side_by_side(loads: str) -> None:
    status, text = run(loads, "--gpus", "2", "--redundant", "2")
    assert status == 0
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("2 layers of 4 experts on 2 GPUs in 1 node, 2 redundant")
    assert lines[2] == ["linear", "0.800", "0.875", "0.750", "(layer", "0)"]
    assert lines[3] == ["rebalanced", "1.000", "1.000", "1.000", "(layer", "0)"]


def test_the_json_has_the_placement_and_can_be_read_again(loads: str, tmp_path: Path) -> None:
    status, text = run(loads, "--gpus", "2", "--redundant", "2", "--json")
    found = json.loads(text)
    assert status == 0 and found["placement"][0] == [0, 1, 2, 0, 1, 3]
    assert found["copies"][0] == [2, 2, 1, 1] and found["balance"]["rebalanced"]["layers"] == [1.0, 1.0]
    again = tmp_path / "placed.json"
    again.write_text(text)
    status, text = run(str(again), "--gpus", "2", "--json")
    balance = json.loads(text)["balance"]
    assert list(balance) == ["now", "linear", "rebalanced"]
    assert (balance["now"]["overall"], balance["linear"]["overall"]) == (1.0, 0.8)


@pytest.mark.parametrize(
    ("content", "words", "reason"),
    [
        ("[[1, 2], [3]]", (), "no table of numbers"),
        ("{", (), "is no JSON"),
        ('{"load": [[1]]}', (), "without 'loads'"),
        ("[[1, 2, 3, 4]]", ("--gpus", "3"), "Take 2 redundant"),
        ("[[1, 2, 3, 4]]", ("--gpus", "2", "--groups", "3"), "3 equal groups"),
        ('{"loads": [[1, 2]], "placement": [[0, 0]]}', ("--gpus", "2"), "no slot for expert 1 of layer 0"),
        ('{"loads": [[1, 2]], "placement": [[0]]}', ("--gpus", "1"), "1 slots for 2 experts"),
        ('{"loads": [[1, 2]], "placement": [[0, 2]]}', ("--gpus", "2"), "beyond 0 to 1"),
        ('{"loads": [[1, 2]], "placement": [[0, 1], [1, 0]]}', ("--gpus", "2"), "2 layers"),
        ('{"loads": [[1, 2]], "placement": ["x"]}', ("--gpus", "2"), "no table of experts"),
    ],
)
def test_what_cannot_be_used_is_told(
    tmp_path: Path, content: str, words: tuple[str, ...], reason: str
) -> None:
    file = tmp_path / "loads.json"
    file.write_text(content)
    status, text = run(str(file), *words)
    assert status == 1 and reason in text and "Traceback" not in text


def test_a_file_or_a_model_must_be_named(loads: str, tmp_path: Path) -> None:
    for words in ((), (loads, "--model", "m")):
        status, text = run(*words)
        assert status == 1 and "Name either" in text
    status, text = run(str(tmp_path / "none.json"))
    assert status == 1 and "cannot be read: No such file" in text
    status, text = run("--model", "m", "--state-dir", str(tmp_path))
    assert status == 1 and "does not run here" in text


def test_a_served_models_counts_are_summed_over_its_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = [UnitStatus(id=f"moe-{number}", state="ready", since_s=1) for number in range(2)]
    common: dict[str, Any] = {
        "category": "chat", "engine": "vllm", "device": "cpu:0", "state": "ready", "since_s": 1
    }  # fmt: skip
    models = [ModelStatus(id="moe", replicas=replicas, **common), ModelStatus(id="dense", **common)]
    scheduler = SchedulerStatus(pid=1, started=0.0)
    whole = Status(scheduler=scheduler, profile="p", base_url="", ready=True, models=models)

    async def status(config: Config) -> Status:
        return whole

    monkeypatch.setattr(control, "status", status)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    runtime_dir = Config(state_dir=tmp_path).runtime_dir
    for replica in replicas:
        path = expert_load.path_of(socket_path(runtime_dir, replica.id))
        path.parent.mkdir(parents=True)
        write(path, 0, [[6, 2, 4, 4]])
    found, text = run("--model", "moe", "--gpus", "2", "--json", "--state-dir", str(tmp_path))
    assert found == 0 and json.loads(text)["loads"] == [[12, 4, 8, 8]]
    found, text = run("--model", "dense", "--state-dir", str(tmp_path))
    assert found == 1 and "counted no tokens per expert" in text
    found, text = run("--model", "mo", "--state-dir", str(tmp_path))
    assert found == 1 and "'mo' is not served here. Did you mean moe?" in text
