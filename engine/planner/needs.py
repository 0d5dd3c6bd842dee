"""What a model needs of GPUs, in figures that placement can reckon with; None is unknown, never a guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.runners.spec import Category, EngineKind

#: Weight dtypes by bytes per parameter of the routed experts, scales included (int4: groups of 32 with a
#: 16-bit scale; fp4: blocks of 32 with an 8-bit scale; fp8: blocks of 128 x 128 with a 32-bit scale).
EXPERT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0 + 4 / 128**2, "int4": 0.5 + 2 / 32, "fp4": 0.5 + 1 / 32}


@dataclass(frozen=True)
class KvTerms:
    """The KV cache of a whole model, before any division among GPUs."""

    #: Growth with each token at 16 bits, bytes. Layers with a window or a constant state are not in it.
    token_bytes: float
    #: The same with an fp8 cache; None = the architecture has none in vLLM.
    fp8_token_bytes: float | None = None
    #: KV heads; tensor parallelism divides by at most so many. 1 for a latent cache.
    heads: int = 1
    #: One latent per token for all heads (MLA): every tensor-parallel rank holds the whole.
    latent: bool = False
    #: What one sequence holds beside: sliding windows, the states of linear attention, bytes.
    sequence_bytes: float = 0.0


@dataclass(frozen=True)
class ActivationTerms:
    """Widths that decide the memory of one forward pass."""

    hidden: int
    vocabulary: int
    #: Width of a head's query and of its value after MLA's up-projection; 0 = no MLA.
    latent_head: int = 0


@dataclass(frozen=True)
class ModelNeeds:
    """A model as placement sees it."""

    id: str
    category: Category
    engine: EngineKind
    #: Where the weights come from, for the launch line: a repository or folder.
    source: str
    architecture: str = ""
    #: 'bf16', 'fp16', 'fp32', 'fp8', 'int4', 'fp4'; '' = unknown.
    dtype: str = ""
    weights_bytes: int | None = None
    #: Bytes of the routed experts in ``weights_bytes``; 0 = dense, None = unknown.
    expert_bytes: int | None = 0
    #: Bytes of a draft (MTP) layer in ``weights_bytes``: vLLM skips it unless speculative decoding is on.
    draft_bytes: int = 0
    experts: int = 0
    experts_per_token: int = 0
    layers: int | None = None
    #: Query heads of a layer; None = unknown, at least a multiple of the KV heads.
    attention_heads: int | None = None
    kv: KvTerms | None = None
    activation: ActivationTerms | None = None
    #: Longest input plus output, tokens.
    context: int | None = None
    #: For engines without a KV cache, memory of one replica in all, bytes; None = reckoned from the weights.
    whole_bytes: int | None = None
    #: Most ranks that may split one expert or MLP by tensor parallelism, from its widths; None = no limit.
    most_tp: int | None = None
    #: vLLM's own options that this model always wants ("tool-call-parser" …).
    arguments: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    #: Options of the engine beside ``arguments`` (a chat template …).
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_moe(self) -> bool:
        return self.experts > 0

    @property
    def dense_bytes(self) -> int:
        """Weights that are loaded and are no routed experts."""
        return self.loaded_bytes - (self.expert_bytes or 0)

    @property
    def loaded_bytes(self) -> int:
        """Weights without the draft layer."""
        return (self.weights_bytes or 0) - self.draft_bytes

    def unknown(self) -> list[str]:
        """The figures without which this model cannot be placed, by name."""
        missing = []
        if self.weights_bytes is None and self.whole_bytes is None:
            missing.append("weight bytes")
        if self.engine == "vllm":
            if self.weights_bytes is None and self.whole_bytes is not None:
                missing.append("weight bytes")
            if self.kv is None and self.category != "embedding":
                missing.append("KV bytes per token")
            if self.context is None:
                missing.append("context length")
            if self.is_moe and self.expert_bytes is None:
                missing.append("expert bytes")
        return missing


def routed_expert_bytes(total: float, active: float, experts: int, per_token: int, dtype: str) -> int | None:
    """Bytes of all routed experts, from published parameter counts.

    Args:
        total: all parameters, without a draft (MTP) layer.
        active: those that one token uses.
        experts: routed experts of a layer.
        per_token: of these, how many one token uses.
        dtype: the experts' dtype.

    A token skips the share ``1 - per_token / experts`` of the experts and nothing else, so
    ``total - active`` is that share of their parameters. None where the dtype's size is unknown.
    """
    size = EXPERT_BYTES.get(dtype)
    if size is None or not 0 < per_token < experts:
        return None
    return int((total - active) / (1 - per_token / experts) * size)
