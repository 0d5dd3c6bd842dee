"""What the installed vLLM (0.32) would silently ignore or crash on, and where: read from its code.

Each function gives the reason, or None where all is well.
"""

from __future__ import annotations

from engine.planner.hardware import GpuKind
from engine.planner.needs import ModelNeeds

#: MoE architectures whose class has vLLM's MixtureOfExperts interface, which EPLB works through.
EPLB_ARCHITECTURES = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "Glm4MoeForCausalLM",
        "GlmMoeDsaForCausalLM",
        "MixtralForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)
#: MoE architectures without it: EPLB is never registered, and no error says so.
EPLB_INERT = frozenset({"GptOssForCausalLM", "MiniMaxM2ForCausalLM"})
#: Sparse attention over a latent cache: the kernels are for Hopper and Blackwell.
SPARSE_LATENT = frozenset({"DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "GlmMoeDsaForCausalLM"})
#: Where vLLM or the model's recipe takes an fp8 cache by itself.
FP8_CACHE_FIRST = frozenset({"DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM"})


def eplb_reason(needs: ModelNeeds, ep_size: int) -> str | None:
    """Why expert load balancing cannot be had for this model."""
    if not needs.is_moe:
        return "EPLB balances experts and this model has none"
    if needs.dtype == "int4":
        return (
            "EPLB with int4 (WNA16) experts: vLLM raises NotImplementedError at start-up on every backend "
            "but Triton (compressed_tensors_moe_wna16.py)"
        )
    if needs.architecture in EPLB_INERT:
        return (
            f"vLLM ignores EPLB for {needs.architecture} without a word: its class lacks the "
            "MixtureOfExperts interface"
        )
    if needs.architecture not in EPLB_ARCHITECTURES:
        return f"it is not known whether vLLM's EPLB works with {needs.architecture or 'this architecture'}"
    if ep_size < 2:
        return "EPLB needs expert parallelism over two GPUs or more"
    return None


def capability_reason(needs: ModelNeeds, kind: GpuKind, kv_dtype: str) -> str | None:
    """Why this GPU's generation cannot run the model, or its cache."""
    if needs.engine != "vllm":
        return None
    if needs.architecture in SPARSE_LATENT and kind.capability[0] < 9:
        return f"{needs.architecture}'s sparse attention needs a GPU of the Hopper generation or later"
    if kv_dtype == "fp8":
        if needs.kv is None or needs.kv.fp8_token_bytes is None:
            return "an fp8 KV cache is not known to work with this architecture"
        if kind.capability < (8, 9):
            return f"an fp8 KV cache needs compute capability 8.9; {kind.name} has {_dotted(kind)}"
    return None


def split_reason(needs: ModelNeeds, tp: int) -> str | None:
    """Why the model cannot be split among ``tp`` tensor-parallel ranks."""
    if tp == 1:
        return None
    kv = needs.kv
    if needs.attention_heads is None:
        if kv is None or kv.latent or kv.heads % tp:
            return f"the number of its attention heads is not known, so TP{tp} may not divide them"
    elif needs.attention_heads % tp:
        return f"{needs.attention_heads} attention heads are not divisible by TP{tp}"
    if needs.most_tp is not None and tp > needs.most_tp:
        return f"its quantised blocks split among {needs.most_tp} ranks at most"
    if kv is not None and not kv.latent and kv.heads % tp and tp % kv.heads:
        return f"{kv.heads} KV heads are neither divisible by TP{tp} nor repeated whole"
    return None


def all2all_backend(nodes: int, rdma: bool) -> str:
    """What moves tokens to their experts; inside a node vLLM's default serves (no recipe sets one)."""
    return "deepep_low_latency" if nodes > 1 and rdma else ""


def _dotted(kind: GpuKind) -> str:
    return f"{kind.capability[0]}.{kind.capability[1]}"
