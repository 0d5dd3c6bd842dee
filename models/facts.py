"""What is known of a model's size: its KV cache, its experts, and what that means in memory. Pure.

Figures are of the whole model, not of one GPU's share. What no source tells is None, never guessed.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.runners.spec import EngineKind

#: Bytes of one number of the KV cache at 16 bits.
_KV_BYTES = 2
#: Tokens of context that "fits" asks room for, beside the weights.
LEAST_CONTEXT = 8192
#: Share of a GPU's memory that may be planned with; the rest is CUDA's own. vLLM's default.
USABLE_SHARE = 0.92
#: Memory beside weights and KV cache: activations, CUDA graphs, libraries. Reckoned, not measured.
RESERVE_BYTES: dict[EngineKind, int] = {
    "vllm": 3 * 2**30,
    "diffusers": 4 * 2**30,
    "faster-whisper": 3 * 2**29,
    "sentence-transformers": 2**30,
    "ultralytics": 2**30,
}


class SlidingLayers(BaseModel):
    """Layers that keep the last tokens only: a fixed amount for each sequence, whatever its length."""

    model_config = ConfigDict(extra="forbid")
    layers: int = Field(ge=1)
    window: int = Field(ge=1, description="Tokens kept.")
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)

    @property
    def bytes_per_sequence(self) -> int:
        """Of one sequence at least as long as the window, at 16 bits."""
        return self.layers * self.window * 2 * self.kv_heads * self.head_dim * _KV_BYTES


class KvCache(BaseModel):
    """What one token of context adds to the KV cache, and the terms that it comes from."""

    model_config = ConfigDict(extra="forbid")
    bytes_per_token: int = Field(ge=1, description="At 16 bits, over all layers that grow with the context.")
    layers: int | None = Field(default=None, ge=1, description="Layers of the model.")
    growing_layers: int | None = Field(
        default=None,
        ge=1,
        description="Layers whose cache grows with the context; the others keep a window or a fixed state. "
        "None = all.",
    )
    kv_heads: int | None = Field(default=None, ge=1, description="KV heads of a growing layer.")
    head_dim: int | None = Field(default=None, ge=1, description="Of a growing layer's keys and values.")
    mla_rank: int | None = Field(default=None, ge=1, description="MLA: `kv_lora_rank`, the latent's width.")
    mla_rope: int | None = Field(default=None, ge=1, description="MLA: `qk_rope_head_dim`, kept beside it.")
    indexer_bytes_per_token: int = Field(
        default=0, ge=0, description="Sparse attention: what its indexer keeps, on top."
    )
    fp8_bytes_per_token: int | None = Field(
        default=None, ge=1, description="With an fp8 cache, where its layout is not simply half."
    )
    sliding: SlidingLayers | None = Field(default=None, description="Layers with a window.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        reckoned = self.reckoned
        if reckoned is not None and reckoned != self.bytes_per_token:
            raise ValueError(f"bytes_per_token is {self.bytes_per_token}, but its terms give {reckoned}")
        return self

    @property
    def is_mla(self) -> bool:
        """Multi-head latent attention: one latent a token, the same for every tensor-parallel rank."""
        return self.mla_rank is not None

    @property
    def reckoned(self) -> int | None:
        """``bytes_per_token`` from the terms; None where they are not known."""
        layers = self.growing_layers or self.layers
        if layers is None:
            return None
        if self.mla_rank is not None and self.mla_rope is not None:
            return layers * (self.mla_rank + self.mla_rope) * _KV_BYTES
        if self.kv_heads is not None and self.head_dim is not None:
            return layers * 2 * self.kv_heads * self.head_dim * _KV_BYTES
        return None

    def bytes_of(self, tokens: int, sequences: int = 1) -> int:
        """The cache of ``sequences`` that hold ``tokens`` together, at 16 bits."""
        fixed = self.sliding.bytes_per_sequence * sequences if self.sliding else 0
        return tokens * (self.bytes_per_token + self.indexer_bytes_per_token) + fixed


class Experts(BaseModel):
    """Routed experts of each mixture-of-experts layer."""

    model_config = ConfigDict(extra="forbid")
    count: int = Field(ge=2, description="Routed experts of a layer.")
    per_token: int = Field(ge=1, description="Of these, how many a token goes to.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.per_token > self.count:
            raise ValueError(f"per_token is {self.per_token}, of {self.count} experts")
        return self


def replica_bytes(weights: int, kv: KvCache | None, tokens: int | None, reserve: int) -> int:
    """Memory of one replica on one GPU: weights, the cache of one request of ``tokens``, the reserve."""
    return weights + reserve + (kv.bytes_of(tokens) if kv is not None and tokens else 0)
