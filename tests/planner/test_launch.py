"""Launch lines: what is started for a placement, and that the installed vLLM takes it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.config import ROOT
from engine.planner.catalog import nodes_of, wants_of
from engine.planner.chart import chart
from engine.planner.document import document
from engine.planner.launch import LaunchLine, launch_lines, spec_of
from engine.planner.layout import Want
from engine.planner.outcome import Plan
from engine.planner.plan import make_plan
from models.catalog import load_profiles
from tests.planner.support import catalog, plan

RUN = Path("/run/hearth")

PARSE = """
import json, sys
from engine.runners.environment import repair_imports
repair_imports()
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
found = []
for line in json.load(sys.stdin):
    given = parser.parse_args(line)
    validate_parsed_serve_args(given)
    names = "model_tag", "tensor_parallel_size", "data_parallel_size", "kv_cache_memory_bytes", "headless"
    found.append({name: getattr(given, name) for name in names})
print("ANSWER" + json.dumps(found))
"""


def lines(found: Plan) -> list[LaunchLine]:
    assert not found.refusals
    return [line for placement in found.placements for line in launch_lines(placement, RUN)]


def value(line: LaunchLine, option: str) -> str | None:
    """The value of ``--option=value``; '' of a bare flag; None = not there."""
    for argument in line.arguments:
        name, _, given = argument.partition("=")
        if name == f"--{option}":
            return given
    return None


def test_a_line_names_gpus_weights_memory_and_layout() -> None:
    (line,) = lines(plan("1x8xH200", "deepseek-r1"))
    assert line.text.startswith("CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 vllm serve deepseek-ai/DeepSeek-R1 ")
    assert value(line, "data-parallel-size") == "8" and value(line, "tensor-parallel-size") == "1"
    assert value(line, "enable-expert-parallel") == "" and value(line, "enable-eplb") is None
    assert value(line, "max-model-len") == "32768"
    assert value(line, "uds") == "/run/hearth/deepseek-r1-0.sock"
    assert value(line, "tool-call-parser") == "deepseek_v3"
    placement = plan("1x8xH200", "deepseek-r1").placements[0]
    assert value(line, "kv-cache-memory-bytes") == str(placement.footprint.kv_bytes)


def test_several_models_on_one_gpu_have_fixed_budgets_each() -> None:
    found = plan("1x1xH200", "qwen3-8b", "qwen2.5-coder-7b", "bge-m3")
    first, second, third = lines(found)
    for line in (first, second):
        assert int(value(line, "kv-cache-memory-bytes") or 0) > 0
        assert value(line, "gpu-memory-utilization") == "0.05"  # decides nothing beside a fixed cache
        assert dict(line.environment) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert third.arguments[:3] == ("python", "-m", "engine.runners.embedding")


def test_eplb_and_fp8_are_options_of_the_line() -> None:
    (line,) = lines(plan("1x8xH200", Want("deepseek-r1", eplb=True, kv_dtype="fp8")))
    assert value(line, "enable-eplb") == "" and value(line, "kv-cache-dtype") == "fp8"
    config = json.loads(value(line, "eplb-config") or "")
    assert config["num_redundant_experts"] == 8 and config["log_balancedness"] is True
    assert value(line, "enable-ep-weight-filter") is None  # vLLM skips it beside EPLB


def test_a_pipeline_over_two_nodes_has_a_line_on_each() -> None:
    first, second = lines(plan("2x8xH100", "deepseek-r1"))
    assert (first.node, second.node) == ("n0", "n1")
    for rank, line in enumerate((first, second)):
        assert value(line, "pipeline-parallel-size") == "2" and value(line, "tensor-parallel-size") == "8"
        assert value(line, "node-rank") == str(rank) and value(line, "master-addr") == "n0"
    assert value(first, "headless") is None and value(second, "headless") == ""
    assert value(first, "uds") and value(second, "uds") is None


def test_wide_expert_parallelism_counts_its_ranks_over_the_nodes() -> None:
    first, second = lines(plan("2x8xH200", "deepseek-v4-pro"))
    for line in (first, second):
        assert value(line, "data-parallel-size") == "16" and value(line, "data-parallel-size-local") == "8"
        assert value(line, "all2all-backend") == "deepep_low_latency"
        assert value(line, "data-parallel-address") == "n0"
    assert value(first, "data-parallel-start-rank") is None
    assert value(second, "data-parallel-start-rank") == "8" and value(second, "headless") == ""
    # Headless nodes start no API servers.
    assert value(first, "api-server-count") == "1" and value(second, "api-server-count") is None


def test_a_spec_is_what_the_runner_takes() -> None:
    found = plan("1x8xH200", "deepseek-r1", "whisper-large-v3")
    r1, whisper = (spec_of(each, RUN) for each in found.placements)
    assert r1.device == "cuda:0,1,2,3,4,5,6,7" and r1.model_dir == Path("deepseek-ai/DeepSeek-R1")
    assert whisper.engine == "faster-whisper" and whisper.device.count(",") == 0
    assert whisper.memory_bytes == found.placements[1].footprint.total


def test_the_document_is_json_and_adds_up() -> None:
    found = plan("1x8xH200", "deepseek-r1", "whisper-large-v3", Want("gpt-oss-120b", eplb=True))
    data = json.loads(json.dumps(document(found, 0.92, RUN)))
    assert data["fits"] is False and data["refusals"][0]["step"] == "EPLB"
    for placement in data["placements"]:
        assert placement["gpu_bytes"] == sum(term["bytes"] for term in placement["terms"])
        assert placement["launch"][0]["line"].startswith("CUDA_VISIBLE_DEVICES=")
    usable = data["nodes"][0]["usable_bytes"] * 8
    taken = sum(p["gpu_bytes"] * sum(len(g["gpus"]) for g in p["gpus"]) for p in data["placements"])
    assert usable - taken == sum(data["nodes"][0]["free_bytes"])


def text_of(found: Plan) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(chart(found, 0.92, RUN), soft_wrap=True)
    return console.export_text()


def test_the_chart_has_a_bar_for_each_gpu_and_all_the_reasons() -> None:
    text = text_of(plan("1x8xH200", "deepseek-r1", "whisper-large-v3", Want("gpt-oss-120b", eplb=True)))
    bars = [line for line in text.splitlines() if line.startswith("n0 gpu")]
    assert len(bars) == 8 and all("of 128.7 GiB" in bar and "AAAA" in bar for bar in bars)
    assert sum("B" in bar.partition("[")[2].partition("]")[0] for bar in bars) == 1
    assert len({bar.index("]") for bar in bars}) == 1
    assert "Does not fit" in text and "→ Leave EPLB out" in text
    assert "GiB  KV cache: 1 x 32768 tokens" in text


def test_nodes_with_nothing_on_them_are_counted_not_drawn() -> None:
    text = text_of(plan("3x8xH200", "whisper-large-v3"))
    assert "2 more nodes with nothing on them" in text


@pytest.mark.engines
def test_the_installed_vllm_accepts_every_line_of_every_profile() -> None:
    plans = [make_plan(catalog(), wants_of(p), nodes_of(p)) for p in load_profiles() if p.needs.nodes]
    plans += [
        plan("2x8xH100", "deepseek-r1"),
        plan("2x8xH200", "deepseek-v4-pro"),
        plan("1x8xH200", Want("deepseek-r1", eplb=True, kv_dtype="fp8")),
        plan("1x8xH200", Want("kimi-k2-6", context=131072, concurrency=12)),
    ]
    served = [line for found in plans for line in lines(found) if line.arguments[0] == "vllm"]
    answer = accepted([list(line.arguments[2:]) for line in served])
    assert len(answer) == len(served) >= 20
    for line, parsed in zip(served, answer, strict=True):
        assert parsed["model_tag"] == line.arguments[2]
        assert str(parsed["kv_cache_memory_bytes"]) == value(line, "kv-cache-memory-bytes")
        assert str(parsed["tensor_parallel_size"]) == value(line, "tensor-parallel-size")


@pytest.mark.engines
def test_the_parser_refuses_what_it_does_not_know() -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        accepted([["org/model", "--tensor-paralel-sizes=2"]])
    assert "unrecognized arguments" in error.value.stderr


def accepted(arguments: list[list[str]]) -> list[dict[str, Any]]:
    """What vLLM's own parser makes of each line, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=300,
    )
    return list(json.loads(done.stdout.partition("ANSWER")[2]))
