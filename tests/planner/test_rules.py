"""What vLLM ignores or crashes on: our lists against the installed vLLM's code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from engine.planner import rules
from engine.planner.needs import KvTerms
from tests.planner.support import catalog, dense, moe, node

#: The interface itself, or the call by which a class that inherits it names its experts.
INTERFACE = re.compile("MixtureOfExperts|extract_moe_parameters")


def vllm_file(*parts: str) -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts).read_text()


def module_of(architecture: str) -> str:
    """The text of the module that vLLM's registry names for an architecture."""
    registry = vllm_file("model_executor", "models", "registry.py")
    found = re.search(rf'"{architecture}":\s*\(\s*"([\w.]+)",', registry)
    assert found is not None, architecture
    name = found[1]
    if name.startswith("vllm.models."):
        folder = Path(*name.split(".")[1:])
        for file in ("nvidia/model.py", "common/model.py", "model.py"):
            try:
                return vllm_file(str(folder), file)
            except OSError:
                continue
    return vllm_file("model_executor", "models", f"{name}.py")


@pytest.mark.parametrize("architecture", sorted(rules.EPLB_ARCHITECTURES))
def test_what_we_balance_has_vllms_interface_for_it(architecture: str) -> None:
    assert INTERFACE.search(module_of(architecture))


@pytest.mark.parametrize("architecture", sorted(rules.EPLB_INERT))
def test_what_we_call_inert_lacks_it(architecture: str) -> None:
    assert not INTERFACE.search(module_of(architecture))


def test_int4_experts_still_crash_under_eplb() -> None:
    text = vllm_file(
        "model_executor", "layers", "quantization", "compressed_tensors", "compressed_tensors_moe",
        "compressed_tensors_moe_wna16.py",
    )  # fmt: skip
    body = text[text.index("def supports_eplb") :][:200]
    assert "triton" in body.lower()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("gpt-oss-120b", "vLLM ignores EPLB for GptOssForCausalLM without a word"),
        ("minimax-m2.5", "vLLM ignores EPLB for MiniMaxM2ForCausalLM"),
        ("kimi-k2-6", "raises NotImplementedError"),
        ("qwen3-32b", "has none"),
        ("deepseek-r1", None),
        ("glm-5", None),
    ],
)
def test_eplb_is_refused_with_the_reason(model: str, says: str | None) -> None:
    reason = rules.eplb_reason(catalog()[model], 8)
    assert reason is None if says is None else says in str(reason)


def test_eplb_needs_ranks_and_a_known_architecture() -> None:
    assert "over two GPUs" in str(rules.eplb_reason(moe(), 1))
    assert "not known" in str(rules.eplb_reason(moe(architecture="NewMoeForCausalLM"), 8))


def test_sparse_latent_attention_needs_hopper() -> None:
    v32 = catalog()["deepseek-v3.2"]
    assert "Hopper" in str(rules.capability_reason(v32, node("1x8xA100-80").kind, "bf16"))
    assert rules.capability_reason(v32, node("1x8xH200").kind, "fp8") is None


def test_an_fp8_cache_needs_a_gpu_and_an_architecture_for_it() -> None:
    assert "8.9; A100-80 has 8.0" in str(rules.capability_reason(dense(), node("1x1xA100").kind, "fp8"))
    assert rules.capability_reason(dense(), node("1x1xL40S").kind, "fp8") is None
    without = dense(kv=None)
    assert "not known" in str(rules.capability_reason(without, node().kind, "fp8"))


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "says"),
    [
        (8, 32, 8, None),
        (8, 28, 4, "28 attention heads are not divisible by TP8"),
        (8, 32, 4, None),  # held twice each
        (6, 24, 8, "8 KV heads are neither divisible"),
        (4, None, 8, None),
        (8, None, 4, "not known"),
    ],
)
def test_heads_must_divide(tp: int, heads: int | None, kv_heads: int, says: str | None) -> None:
    reason = rules.split_reason(dense(attention_heads=heads, kv=KvTerms(1, heads=kv_heads)), tp)
    assert reason is None if says is None else says in str(reason)
    assert "blocks split among 4" in str(rules.split_reason(dense(most_tp=4), 8))
