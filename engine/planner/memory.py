"""The memory of one replica on each of its GPUs: weights + KV cache + activations + CUDA's own, term by term.

See docs/planning.md for the formula with worked examples. The allowances are vLLM's as it logs them
(`gpu_worker.py`: model loading, peak activation, CUDA graphs), rounded up; they were set once so that the
published 46.80 GiB of cache for Kimi-K2-Thinking under TP8 on 8 x H200 comes out, and hold for all models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from engine.planner.hardware import GpuKind
from engine.planner.layout import Layout, Policy, Want
from engine.planner.needs import ActivationTerms, KvTerms, ModelNeeds
from engine.runners.spec import EngineKind

GIB = 2**30
MIB = 2**20
#: What the driver keeps of each GPU: PyTorch sees so much less than `nvidia-smi` shows.
DRIVER_BYTES = 480 * MIB
#: CUDA context, libraries and the allocator's remainders of one process on one GPU.
CONTEXT_BYTES = GIB
#: NCCL's and the custom all-reduce's buffers on each GPU of a replica with several.
COMMUNICATION_BYTES = GIB
#: CUDA graphs of one layer.
GRAPH_BYTES = 24 * MIB
#: Tensor parallelism leaves norms, routers and MLA's down-projections whole on every rank.
UNSPLIT_SHARE = 0.02
#: vLLM's longest prefill of cached tokens in one go under MLA (`mla_attention.py`), tokens.
LATENT_WORKSPACE_TOKENS = 64 * 1024
#: Cache is given out in blocks; a context takes whole ones.
BLOCK_TOKENS = 256
#: Beside the weights of an engine without a KV cache, where the catalog gives no measured figure: bytes, and
#: a share of the weights.
ENGINE_ALLOWANCE: Mapping[EngineKind, tuple[int, float]] = {
    "diffusers": (4 * GIB, 0.15),
    "faster-whisper": (2 * GIB, 0.5),
    "sentence-transformers": (2 * GIB, 0.5),
    "ultralytics": (GIB, 1.0),
}


@dataclass(frozen=True)
class Term:
    """One part of a GPU's memory."""

    name: str
    bytes: int
    #: How it was reckoned, for a person.
    how: str


@dataclass(frozen=True)
class Footprint:
    """What one replica takes of each of its GPUs."""

    terms: tuple[Term, ...]
    #: Bytes of cache for one token on one GPU; 0 without a cache.
    token_bytes: float = 0.0
    #: Groups with a cache of their own (DP ranks), and ranks that split one cache by token (DCP).
    caches: int = 1

    @cached_property
    def total(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def kv_bytes(self) -> int:
        return self.of("KV cache")

    @property
    def kv_tokens(self) -> int:
        """Tokens that the whole replica's cache holds."""
        return int(self.kv_bytes / self.token_bytes) * self.caches if self.token_bytes else 0

    def of(self, name: str) -> int:
        """Bytes of the term with this name; 0 when there is none."""
        return sum(term.bytes for term in self.terms if term.name == name)

    def with_kv(self, kv_bytes: int) -> Footprint:
        """The same with another size of the KV cache."""
        terms = tuple(
            Term(t.name, kv_bytes, f"{t.how}, grown into what was left")
            if t.name == "KV cache" and kv_bytes != t.bytes
            else t
            for t in self.terms
        )
        return Footprint(terms, self.token_bytes, self.caches)


def capacity(kind: GpuKind, utilisation: float) -> int:
    """Bytes of one GPU that replicas may take together."""
    return int((kind.memory_bytes - DRIVER_BYTES) * utilisation)


def batched_tokens(kind: GpuKind) -> int:
    """Tokens of one forward pass: vLLM's default for its API server on this GPU (`arg_utils.py`)."""
    if kind.memory_bytes >= 160 * GIB:
        return 16_384
    return 8192 if kind.memory_bytes >= 70 * GIB and not kind.name.startswith("A100") else 2048


def pass_tokens(needs: ModelNeeds, want: Want, kind: GpuKind) -> int:
    """Tokens of one forward pass of this model: what its options say, or the GPU's default."""
    given = needs.arguments.get("max-num-batched-tokens")
    return int(given) if given else max(batched_tokens(kind), want.max_batch)


def footprint(needs: ModelNeeds, want: Want, layout: Layout, kind: GpuKind, policy: Policy) -> Footprint:
    """The memory of one replica on each GPU, without any that the cache may grow into.

    Args:
        needs: the model; none of its figures may be unknown (``needs.unknown()``).
        want: context and concurrency asked.
        layout: how it is spread.
        kind: the GPU it is spread over.
        policy: allowances.
    """
    if needs.engine != "vllm":
        return _whole(needs, want)
    if want.memory_bytes is not None:
        budget = math.ceil(want.memory_bytes / layout.gpus)
        return Footprint((Term("budget", budget, "as configured, the runner divides it"),))
    weights = _weights(needs, layout)
    cache, token_bytes = _cache(needs, want, layout, policy)
    tokens = pass_tokens(needs, want, kind)
    activation = _activation(needs, layout, tokens, want.max_batch, weights)
    layers = math.ceil((needs.layers or 32) / layout.pp)
    terms = [
        Term("weights", weights, _how_weights(needs, layout)),
        Term(
            "unsplit", int(weights * UNSPLIT_SHARE) if layout.tp > 1 else 0, "norms, routers: on every rank"
        ),
        Term("redundant experts", _redundant(needs, layout), f"{layout.redundant_experts} copies"),
        Term("KV cache", cache, _how_cache(needs, want, layout, policy)),
        Term("activations", *activation),
        Term("CUDA context", CONTEXT_BYTES, "context and libraries"),
        Term("communication", COMMUNICATION_BYTES if layout.gpus > 1 else 0, "NCCL and all-reduce buffers"),
        Term("CUDA graphs", layers * GRAPH_BYTES, f"{GRAPH_BYTES // MIB} MiB x {layers} layers"),
    ]
    kept = tuple(term for term in terms if term.bytes)
    return Footprint(kept, token_bytes, layout.dp * layout.dcp)


def kv_token_bytes(kv: KvTerms, layout: Layout) -> float:
    """Cache bytes of one token on one GPU."""
    whole = kv.fp8_token_bytes if layout.kv_dtype == "fp8" and kv.fp8_token_bytes else kv.token_bytes
    # DCP is counted in Footprint.caches: each rank holds every dcp-th token whole.
    share = 1.0 if kv.latent else max(1, math.ceil(kv.heads / layout.tp)) / kv.heads
    return whole * share / layout.pp


def context_of(needs: ModelNeeds, want: Want, policy: Policy) -> int:
    """Tokens of the longest sequence that is planned for."""
    return want.context or min(needs.context or policy.default_context, policy.default_context)


def asked_tokens(needs: ModelNeeds, want: Want, layout: Layout, policy: Policy) -> int:
    """Tokens of cache that each GPU must hold for the context and concurrency asked.

    A sequence lives in one cache only, so each DP rank has room for its share of the sequences, one at least.
    """
    context = math.ceil(context_of(needs, want, policy) / BLOCK_TOKENS) * BLOCK_TOKENS
    sequences = math.ceil(want.concurrency / layout.dp)
    return math.ceil(context * sequences / layout.dcp) + BLOCK_TOKENS


def _weights(needs: ModelNeeds, layout: Layout) -> int:
    experts = needs.expert_bytes or 0
    split = layout.ep_size if layout.ep else layout.tp
    stages = layout.pp
    if needs.layers and stages > 1:  # the fullest stage
        return math.ceil((needs.dense_bytes / layout.tp + experts / split) * _fullest(needs.layers, stages))
    return math.ceil(needs.dense_bytes / layout.tp + experts / split)


def _fullest(layers: int, stages: int) -> float:
    return math.ceil(layers / stages) / layers


def _redundant(needs: ModelNeeds, layout: Layout) -> int:
    if not layout.eplb or not layout.redundant_experts or not needs.experts:
        return 0
    return math.ceil((needs.expert_bytes or 0) / needs.experts * layout.redundant_experts / layout.ep_size)


def _cache(needs: ModelNeeds, want: Want, layout: Layout, policy: Policy) -> tuple[int, float]:
    if needs.kv is None:
        return 0, 0.0
    token = kv_token_bytes(needs.kv, layout)
    if want.kv_bytes is not None:
        return want.kv_bytes, token
    sequences = math.ceil(want.concurrency / layout.dp)
    share = max(1, math.ceil(needs.kv.heads / layout.tp)) / needs.kv.heads / layout.pp
    constant = needs.kv.sequence_bytes * share * sequences
    return math.ceil(asked_tokens(needs, want, layout, policy) * token + constant), token


def _activation(
    needs: ModelNeeds, layout: Layout, tokens: int, sequences: int, weights: int
) -> tuple[int, str]:
    terms = needs.activation
    if terms is None:
        size = min(7 * GIB, GIB + int(weights * 0.05))
        return size, "widths unknown: 1 GiB and 5 % of the weights, 7 GiB at most"
    # Residuals, norms, quantised copies and the widest projection of one layer, 16 widths in all.
    states = tokens * terms.hidden * 2 * 16
    # Each token goes to several experts: inputs gathered by expert, and outputs before they are summed.
    states += 2 * tokens * needs.experts_per_token * terms.hidden * 2
    if layout.ep and layout.dp > 1:  # tokens of all ranks are gathered, results scattered
        states += 2 * tokens * layout.dp * terms.hidden * 2
    # Logits in 32 bits, their softmax, and the sampler's sorted copy.
    logits = sequences * terms.vocabulary * 4 * 3
    return states + logits + _latent(
        needs, terms, layout
    ), f"{tokens} tokens a pass, {sequences} sequences sampled"


def _latent(needs: ModelNeeds, terms: ActivationTerms, layout: Layout) -> int:
    """Keys and values of cached tokens, projected up from the latent for a prefill."""
    heads = math.ceil((needs.attention_heads or 0) / layout.tp)
    return LATENT_WORKSPACE_TOKENS * heads * terms.latent_head * 2


def _whole(needs: ModelNeeds, want: Want) -> Footprint:
    whole = want.memory_bytes or needs.whole_bytes
    weights = needs.weights_bytes or 0
    if whole is not None:
        rest = max(0, whole - weights)
        return Footprint(
            (Term("weights", whole - rest, "files"), Term("engine", rest, "budget less weights"))
        )
    base, share = ENGINE_ALLOWANCE[needs.engine]
    extra = Term("engine", base + int(weights * share), f"{base // GIB} GiB and {share:.0%} of the weights")
    return Footprint((Term("weights", weights, "files"), extra))


def _how_weights(needs: ModelNeeds, layout: Layout) -> str:
    draft = f", without {needs.draft_bytes / GIB:.1f} GiB of a draft layer" if needs.draft_bytes else ""
    if layout.ep and layout.gpus > 1:
        experts, dense = (needs.expert_bytes or 0) / GIB, needs.dense_bytes / GIB
        return f"{dense:.1f} GiB / TP{layout.tp} + experts {experts:.1f} GiB / EP{layout.ep_size}{draft}"
    split = layout.tp * layout.pp
    return f"{needs.loaded_bytes / GIB:.1f} GiB{f' / {split}' if split > 1 else ''}{draft}"


def _how_cache(needs: ModelNeeds, want: Want, layout: Layout, policy: Policy) -> str:
    if needs.kv is None:
        return "none"
    if want.kv_bytes is not None:
        return "as configured"
    token = kv_token_bytes(needs.kv, layout)
    context = context_of(needs, want, policy)
    return f"{want.concurrency} x {context} tokens, {token:.0f} B each on a GPU"
