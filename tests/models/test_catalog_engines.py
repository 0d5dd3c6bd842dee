"""The catalog against the installed engines: names that they know, options that they take."""

# ruff: noqa: RUF001 - DeepSeek's tokens have fullwidth bars.
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.runners.environment import runner_environment
from engine.runners.spec import RunnerSpec
from models.catalog import ROOT

#: Runs in one process with a vLLM runner's environment, since these libraries take half a minute to import.
SCRIPT = """
import json, sys
from pathlib import Path

import diffusers
import transformers
import ultralytics.nn.tasks as yolo
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.models.registry import ModelRegistry
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.deepseekv3_tool_parser import DeepSeekV3ToolParser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.renderers import deepseek_v4

from engine.runners.spec import RunnerSpec
from engine.runners.vllm_arguments import server_arguments
from models.catalog import load_catalog

HOLDERS = {"diffusers": diffusers, "sentence-transformers": transformers, "faster-whisper": transformers,
           "ultralytics": yolo}
parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
architectures = set(ModelRegistry.get_supported_archs())
tools, thoughts = set(ToolParserManager.list_registered()), set(ReasoningParserManager.list_registered())
faults, checked = [], 0

for entry in load_catalog().entries.values():
    if entry.engine != "vllm":
        if entry.architecture:
            checked += 1
            if not hasattr(HOLDERS[entry.engine], entry.architecture):
                faults.append(f"{entry.id}: {entry.engine} has no class {entry.architecture}")
        continue
    checked += 1
    if entry.architecture and entry.architecture not in architectures:
        faults.append(f"{entry.id}: vLLM has no architecture {entry.architecture}")
    if entry.tool_parser and entry.tool_parser not in tools:
        faults.append(f"{entry.id}: vLLM has no tool parser {entry.tool_parser}")
    if entry.reasoning_parser and entry.reasoning_parser not in thoughts:
        faults.append(f"{entry.id}: vLLM has no reasoning parser {entry.reasoning_parser}")
    spec = RunnerSpec(model=entry.id, aliases=entry.aliases, category=entry.category, engine=entry.engine,
                      model_dir=Path("/m"), socket=Path("/s"), device="cuda:0,1", context_length=8192,
                      options={**entry.options, "kv_cache_bytes": 2**30})
    try:
        parser.parse_args(server_arguments(spec, 0, parser._option_string_actions))
    except SystemExit:
        faults.append(f"{entry.id}: vLLM refuses its options")
    except Exception as error:
        faults.append(f"{entry.id}: {error}")

class Tokens:
    def get_vocab(self):
        return {t: n for n, t in enumerate(json.loads(sys.argv[1])["tokens"])}

found = DeepSeekV3ToolParser(Tokens()).extract_tool_calls(json.loads(sys.argv[1])["call"], None)
fim = [deepseek_v4._FIM_BEGIN, deepseek_v4._FIM_HOLE, deepseek_v4._FIM_END]
calls = [[call.function.name, call.function.arguments] for call in found.tool_calls]
print("\\nRESULT" + json.dumps({"faults": faults, "checked": checked, "calls": calls, "fim": fim}))
"""
TOKENS = [f"<｜tool▁call{name}｜>" for name in ("s▁begin", "s▁end", "▁begin", "▁end")]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.models.test_catalog_template import CALLS, render

    spec = RunnerSpec(
        model="x",
        category="chat",
        engine="vllm",
        model_dir=Path("/m"),
        socket=tmp_path_factory.mktemp("catalog") / "s",
    )
    written = render([{"role": "assistant", "content": "", "tool_calls": CALLS}], add_generation_prompt=False)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps({"call": written, "tokens": TOKENS})],
        env=runner_environment(spec, os.environ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "\nRESULT" in run.stdout, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.rpartition("\nRESULT")[2])
    return found


@pytest.mark.engines
def test_the_installed_engines_know_every_class_parser_and_option(result: dict[str, Any]) -> None:
    assert result["faults"] == []
    assert result["checked"] >= 80


@pytest.mark.engines
def test_vllms_parser_reads_the_calls_that_the_r1_template_writes(result: dict[str, Any]) -> None:
    assert result["calls"] == [["run_linter", '{"code": "x=1"}'], ["now", "{}"]]


@pytest.mark.engines
def test_the_deepseek_template_of_the_middle_is_vllms_own(result: dict[str, Any]) -> None:
    from models.catalog import load_catalog

    begin, hole, end = result["fim"]
    for name in ("deepseek-v4-flash", "deepseek-v4-pro", "deepseek-coder-v2-lite"):
        fim = load_catalog().find(name).fim
        assert fim is not None and fim.template == f"{begin}{{prefix}}{hole}{{suffix}}{end}"
