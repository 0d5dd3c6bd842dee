"""`hearth plan` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from engine.cli.plan import plan

app = typer.Typer()
app.command()(plan)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_models_on_nodes_are_drawn_and_the_status_is_nought() -> None:
    done = run("--nodes", "1x8xH200", "--models", "deepseek-r1,whisper-large-v3")
    assert done.exit_code == 0, done.output
    assert "DP8+EP on n0:gpu0-7" in done.output and "vllm serve deepseek-ai/DeepSeek-R1" in done.output


def test_a_profile_brings_its_nodes_and_other_nodes_win() -> None:
    assert run("--profile", "flagship").exit_code == 0
    done = run("--profile", "flagship", "--nodes", "1x8xH100")
    assert done.exit_code == 1 and "It fits with" in done.output


def test_json_is_the_whole_plan_and_the_status_one_when_something_has_no_place() -> None:
    done = run("--nodes", "1x8xH100", "--models", "deepseek-r1,qwen3-8b:2", "--json")
    data = json.loads(done.output)
    assert done.exit_code == 1 and data["fits"] is False
    assert [p["id"] for p in data["placements"]] == ["qwen3-8b-0", "qwen3-8b-1"]
    assert data["refusals"][0]["change"].startswith("It fits with 1 more node of 8xH100")


def test_options_change_every_want() -> None:
    done = run(
        "--nodes", "1x8xH200", "--models", "deepseek-r1", "--context", "65536", "--concurrency", "16",
        "--kv-dtype", "fp8", "--objective", "latency", "--json",
    )  # fmt: skip
    (placement,) = json.loads(done.output)["placements"]
    assert placement["context_length"] == 65536 and placement["layout"]["name"] == "TP8 fp8-KV"
    assert placement["kv_tokens"] >= 16 * 65536


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--models", "deepseek-r1"], "Nowhere to plan"),
        (["--nodes", "1x8xH200"], "Nothing to plan"),
        (["--nodes", "1x8xH2000", "--models", "deepseek-r1"], "Did you mean H200?"),
        (["--nodes", "8xH200", "--models", "deepseek-r1"], "NODESxGPUSxKIND"),
        (["--nodes", "1x8xH200", "--models", "deepsek-r1"], "Did you mean deepseek-r1"),
        (["--nodes", "1x8xH200", "--models", "deepseek-r1:many"], "number of replicas"),
        (["--profile", "flagshop"], "Did you mean flagship"),
    ],
)
def test_what_cannot_be_read_is_explained(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1 and says in done.output


def test_standby_models_are_named_and_shown() -> None:
    models = "qwen3-32b,gpt-oss-120b,gemma-3-27b-it"
    done = run("--nodes", "1x2xH100", "--models", models, "--standby", models, "--context", "8192")
    assert done.exit_code == 0 and "asleep: " in done.output and "in turn: B C" in done.output
    refused = run("--nodes", "1x2xH100", "--models", models, "--context", "8192")
    assert refused.exit_code == 1 and 'standby (`tier = "standby"`): they take turns' in refused.output
    wrong = run("--nodes", "1x1xH100", "--models", "qwen3-8b", "--standby", "bge-m3")
    assert wrong.exit_code == 1 and "--standby names bge-m3, which is not among the models" in wrong.output


def test_the_configuration_is_laid_over_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hearth.toml").write_text(
        '[models."sdxl-base-1.0"]\nenabled = false\n[models."qwen3-0.6b"]\ntier = "standby"\n'
    )
    placements = json.loads(run("--profile", "gpu-h200", "--json").output)["placements"]
    tiers = {placement["model"]: placement["tier"] for placement in placements}
    assert tiers["qwen3-0.6b"] == "standby" and "sdxl-base-1.0" not in tiers
    Path("hearth.toml").write_text("[models.no-such-model]\n")
    done = run("--profile", "gpu-h200")
    assert done.exit_code == 1 and "'no-such-model' is not in the catalog" in done.output
