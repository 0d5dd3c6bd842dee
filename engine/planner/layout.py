"""How one replica is spread over GPUs, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.planner.ownership import family

KvDtype = Literal["bf16", "fp8"]
Tier = Literal["resident", "standby"]


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; their product is the GPUs of one replica."""

    #: Tensor parallel ranks: each matrix is split among them; inside a node.
    tp: int = 1
    #: Data parallel ranks of one expert-parallel model ("DP attention"): attention is held by each.
    dp: int = 1
    #: Pipeline stages: layers are split among nodes.
    pp: int = 1
    #: Experts are spread over all tp x dp ranks instead of each being split.
    ep: bool = False
    #: Tensor-parallel ranks among which a latent KV cache is split by token.
    dcp: int = 1
    kv_dtype: KvDtype = "bf16"
    eplb: bool = False
    #: With ``eplb``: copies of busy experts.
    redundant_experts: int = 0
    all2all: str = ""

    @property
    def gpus(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def ep_size(self) -> int:
        return self.tp * self.dp if self.ep else 1

    def name(self) -> str:
        """'TP8', 'DP8+EP', 'TP8 PP2' …"""
        parts = [f"{label}{size}" for label, size in (("TP", self.tp), ("DP", self.dp)) if size > 1]
        text = "x".join(parts) or ("" if self.pp > 1 else "1 GPU")
        text += "+EP" if self.ep else ""
        text += f" PP{self.pp}" if self.pp > 1 else ""
        text += f" DCP{self.dcp}" if self.dcp > 1 else ""
        return text.strip() + (" fp8-KV" if self.kv_dtype == "fp8" else "")


@dataclass(frozen=True)
class Want:
    """One model wanted, and how much of it."""

    model: str
    replicas: int = 1
    #: Most replicas: memory for those beyond ``replicas`` is left free where there is some.
    most: int = 1
    #: Longest input plus output served, tokens; None = the policy's, at most the model's own.
    context: int | None = None
    #: Sequences of that length whose KV cache is held at once.
    concurrency: int = 1
    #: Most sequences (or items) that run together.
    max_batch: int = 64
    #: Higher is placed first; a lower one never takes its place.
    priority: int = 0
    #: 'standby' replicas sleep until a request comes, and share the memory that they are awake in.
    tier: Tier = "resident"
    #: Memory of one replica in all, bytes, where a person has fixed it.
    memory_bytes: int | None = None
    #: KV cache on each GPU, bytes, where a person has fixed it.
    kv_bytes: int | None = None
    #: 'auto' = the checkpoint's own, or fp8 where vLLM makes it the default.
    kv_dtype: Literal["auto", "bf16", "fp8"] = "auto"
    #: True = wanted, and refused where vLLM would ignore it or crash; None = where it is known to help.
    eplb: bool | None = None
    #: A layout that a person has fixed; None = chosen.
    tensor_parallel: int | None = None
    #: The tenant whose replicas these are; '' = shared.
    owner: str = ""
    #: They stand on the owner's own GPUs.
    own_gpus: bool = False

    @property
    def family(self) -> str:
        """What its replicas are named by, less their number."""
        return family(self.model, self.owner)

    @property
    def home(self) -> str:
        """Whose GPUs they stand on; '' = those that nobody owns."""
        return self.owner if self.own_gpus else ""


@dataclass(frozen=True)
class Policy:
    """What the planner may do, and its allowances."""

    #: Share of a GPU's memory that replicas may take (vLLM's own default).
    utilisation: float = 0.92
    #: Context that is planned for where nobody asks for another, tokens.
    default_context: int = 32_768
    #: 'throughput' prefers DP attention with EP for large experts, 'latency' tensor parallelism.
    objective: Literal["throughput", "latency"] = "throughput"
    #: KV caches grow into what is left of their GPUs.
    grow: bool = True
    #: Most steps of the search for a better packing.
    search_steps: int = 20_000
