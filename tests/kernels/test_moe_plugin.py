"""The plugin: found by its entry point, patching once, only what it knows, and transparent to a compiler."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import types
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.moe import load, plugin
from kernels.moe.on_import import on_import
from kernels.moe.reference import experts_reference

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "engine" / "runners" / "shim"


class Activation(Enum):
    """As vLLM's, of which the plugin hands on the value."""

    SILU = "silu"


def make_experts() -> Any:
    """A fresh class like vLLM's: same methods and parameters, plain arithmetic, the map ignored."""

    class CPUUnquantizedExperts:
        def __init__(self) -> None:
            self.rows: list[int] = []

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.processed = True

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: Tensor | None,
            a1q_scale: Tensor | None,
            a2_scale: Tensor | None,
            workspace13: Tensor,
            workspace2: Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            assert activation.value == "silu"
            self.rows.append(topk_ids.numel())
            output.copy_(experts_reference(hidden_states, w1, w2, topk_weights, topk_ids))

    return CPUUnquantizedExperts


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few names of vLLM that the plugin asks for: importing the real one takes seconds."""

    def module(name: str, **names: object) -> None:
        fake = types.ModuleType(name)
        fake.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, fake)

    package = "vllm.model_executor.layers.fused_moe"
    for name in ("vllm.model_executor", "vllm.model_executor.layers", package):
        module(name)
    module("vllm", __version__="0.32.0")
    module(f"{package}.activation", MoEActivation=Activation)
    context = types.SimpleNamespace(attn_metadata={})
    module(
        "vllm.forward_context",
        is_forward_context_available=lambda: True,
        get_forward_context=lambda: context,
    )
    monkeypatch.setattr(plugin, "_layers", [])
    monkeypatch.setattr(load, "_recorder", load._Recorder())
    monkeypatch.delenv(load.VARIABLE, raising=False)
    # vLLM's logger, once configured, hands nothing on to the root, where caplog listens.
    monkeypatch.setattr(plugin, "logger", logging.getLogger("test.hearth_moe"))


def patched() -> Any:
    module = types.ModuleType("cpu_moe")
    module.__dict__["CPUUnquantizedExperts"] = make_experts()
    assert plugin.patch(module)
    return module.CPUUnquantizedExperts


def loaded(experts: Any, name: str = "model.layers.0.mlp.experts") -> Any:
    """An instance of a patched class, its layer loaded."""
    instance = experts()
    layer = types.SimpleNamespace(layer_name=name)
    instance.process_weights_after_loading(layer)
    assert layer.processed, "vLLM's own work is done too"
    return instance


def call(instance: Any, batch: dict[str, Tensor], expert_map: Tensor | None) -> Tensor:
    out = torch.full_like(batch["hidden_states"], 77.0)
    none = out.new_empty(0)
    instance.apply(
        output=out,
        **batch,
        activation=Activation.SILU,
        global_num_experts=4,
        expert_map=expert_map,
        a1q_scale=None,
        a2_scale=None,
        workspace13=none,
        workspace2=none,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return out


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Five tokens with two of four experts each."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(5, 8, generator=generator),
        "w1": torch.randn(4, 12, 8, generator=generator),
        "w2": torch.randn(4, 8, 6, generator=generator),
        "topk_weights": torch.rand(5, 2, generator=generator),
        "topk_ids": torch.tensor([[0, 1], [2, 3], [0, 3], [1, 2], [1, 0]], dtype=torch.int32),
    }


HALF = torch.tensor([0, 1, -1, -1], dtype=torch.int32)


def half_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"w1": batch["w1"][:2], "w2": batch["w2"][:2]}


def wanted(batch: dict[str, Tensor], expert_map: Tensor | None = None) -> Tensor:
    keys = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    return experts_reference(*(batch[key] for key in keys), expert_map).float()


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "hearth_moe"]
    assert [entry.value for entry in found] == ["kernels.moe.plugin:register"]
    assert found[0].load() is plugin.register


def test_with_a_map_only_the_local_pairs_are_worked_on(batch: dict[str, Tensor]) -> None:
    instance = loaded(patched())
    torch.testing.assert_close(call(instance, half_of(batch), HALF), wanted(half_of(batch), HALF))
    assert instance.rows == [6], "six of the ten pairs are here"


def test_without_a_map_it_is_vllms_own(batch: dict[str, Tensor]) -> None:
    instance = loaded(patched())
    torch.testing.assert_close(call(instance, batch, None), wanted(batch))
    assert instance.rows == [10]


def test_patching_again_changes_nothing(batch: dict[str, Tensor]) -> None:
    module = types.ModuleType("cpu_moe")
    module.__dict__["CPUUnquantizedExperts"] = experts = make_experts()
    assert plugin.patch(module)
    once = (experts.apply, experts.process_weights_after_loading)
    assert plugin.patch(module)
    assert (experts.apply, experts.process_weights_after_loading) == once
    instance = loaded(experts)
    call(instance, half_of(batch), HALF)
    assert len(instance.rows) == 1


def test_subclasses_for_other_processors_have_it_too(batch: dict[str, Tensor]) -> None:
    """vLLM's AMX, Arm and Power experts differ from the base by their weights' layout only."""
    experts = type("X86CPUUnquantizedExperts", (patched(),), {})
    instance = loaded(experts)
    torch.testing.assert_close(call(instance, half_of(batch), HALF), wanted(half_of(batch), HALF))


def test_a_compiler_sees_one_operator(batch: dict[str, Tensor]) -> None:
    """vLLM on a CPU compiles through ``apply``; a graph of data-dependent sizes would break it."""
    instance = loaded(patched())
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(instance, half_of(batch), HALF), wanted(half_of(batch), HALF))


@pytest.mark.parametrize("expert_map", [HALF, None])
def test_global_ids_are_counted_with_and_without_a_map(
    batch: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert_map: Tensor | None
) -> None:
    monkeypatch.setenv(load.VARIABLE, str(tmp_path / "experts"))
    experts = patched()
    first, second = loaded(experts, "layers.0"), loaded(experts, "layers.1")
    given = batch if expert_map is None else half_of(batch)
    for instance in (first, second, first):
        torch.testing.assert_close(call(instance, given, expert_map), wanted(given, expert_map))
    numbers = torch.from_file(str(tmp_path / "experts.0"), size=10, dtype=torch.int64)
    assert numbers.tolist() == [2, 4, 6, 6, 4, 4, 3, 3, 2, 2]


def test_runs_for_warming_are_not_counted(
    batch: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(load.VARIABLE, str(tmp_path / "experts"))
    context: Any = sys.modules["vllm.forward_context"]
    context.get_forward_context().attn_metadata = None
    call(loaded(patched()), half_of(batch), HALF)
    assert list(tmp_path.iterdir()) == []


def test_unknown_versions_and_functions_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    def other_parameters(self: Any, output: Tensor) -> None:
        """As of some other vLLM."""

    def reads_the_map(*args: Any) -> None:
        """As of a vLLM that does it by itself."""

    known = make_experts()
    assert plugin.refusal(known, "0.32.0") is None
    assert plugin.refusal(known, "0.32.1+cpu") is None
    for version in ("0.33.0", "0.3.2", "1.32.0", "dev"):
        assert plugin.refusal(known, version) == "only 0.32 is known"
    assert plugin.refusal(None, "0.32.0") == "it has no CPUUnquantizedExperts"

    other = make_experts()
    other.apply = other_parameters
    reason = plugin.refusal(other, "0.32.0")
    assert reason == "CPUUnquantizedExperts.apply has other parameters than those known"

    module = types.ModuleType("cpu_moe")
    module.__dict__["CPUUnquantizedExperts"] = other
    assert not plugin.patch(module)
    assert other.apply is other_parameters
    assert "hearth_moe leaves vLLM 0.32.0 alone" in caplog.text
    assert "--no-enable-expert-parallel" in caplog.text


def test_a_vllm_that_reads_the_map_is_left_alone() -> None:
    source = f"def apply({', '.join(plugin.PARAMETERS)}):\n    return expert_map\n"
    names: dict[str, Any] = {}
    exec(source, names)
    experts = make_experts()
    experts.apply = names["apply"]
    assert plugin.refusal(experts, "0.32.0") == "CPUUnquantizedExperts.apply reads expert_map by itself"


def test_on_import_acts_once_when_the_module_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hearth_late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[object] = []

    def action(module: types.ModuleType) -> None:
        seen.append(module.__dict__["value"])

    finders = list(sys.meta_path)
    for _ in range(3):
        on_import("hearth_late_module", action)
    assert seen == []
    importlib.import_module("hearth_late_module")
    assert seen == [1]
    assert sys.meta_path == finders
    on_import("hearth_late_module", action)
    assert seen == [1, 1], "it is there: at once"
    monkeypatch.delitem(sys.modules, "hearth_late_module")


def test_on_import_of_an_absent_module_is_the_usual_error() -> None:
    on_import("hearth_absent_module", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="hearth_absent_module"):
        importlib.import_module("hearth_absent_module")


REAL = """
import json, sys
import torch
from vllm.plugins import load_general_plugins
load_general_plugins()
from kernels.moe import plugin
early = plugin.MODULE in sys.modules
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
    CPUUnquantizedExperts, X86CPUUnquantizedExperts
)
import vllm
original = CPUUnquantizedExperts.__dict__.get(plugin._MARK)
json.dump({
    "imported early": early,
    "patched": original is not None and CPUUnquantizedExperts.apply is not original,
    "subclass": X86CPUUnquantizedExperts.apply is CPUUnquantizedExperts.apply,
    "operator": hasattr(torch.ops.hearth_moe, "experts"),
}, sys.stdout)
"""


@pytest.mark.engines
def test_the_installed_vllm_is_one_that_the_plugin_knows() -> None:
    """In a process of its own, by vLLM's own loading of plugins."""
    path = os.pathsep.join((str(SHIM), str(ROOT)))
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    ran = subprocess.run([sys.executable, "-c", REAL], env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout[ran.stdout.rindex("{") :]) == {
        "imported early": False,
        "patched": True,
        "subclass": True,
        "operator": True,
    }, ran.stderr
