"""Models and nodes for the planner's tests."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from engine.planner.catalog import needs_of_all
from engine.planner.hardware import Node, parse_nodes
from engine.planner.layout import Layout, Policy, Want
from engine.planner.memory import GIB, Footprint, Term
from engine.planner.needs import KvTerms, ModelNeeds
from engine.planner.outcome import Plan
from engine.planner.plan import make_plan
from engine.planner.select import Option
from models.catalog import load_catalog

DATA = Path(__file__).parent / "data"


@cache
def catalog() -> dict[str, ModelNeeds]:
    return needs_of_all(load_catalog().entries.values())


def published(kind: str) -> list[dict[str, Any]]:
    return list(tomllib.loads((DATA / "published.toml").read_text())[kind])


def node(text: str = "1x8xH200") -> Node:
    return parse_nodes(text)[0]


def plan(nodes: str, *wants: str | Want, **policy: Any) -> Plan:
    """A plan for catalog models."""
    asked = [Want(want) if isinstance(want, str) else want for want in wants]
    return make_plan(catalog(), asked, parse_nodes(nodes), Policy(**policy))


def dense(name: str = "dense", weights_gib: float = 10, **fields: Any) -> ModelNeeds:
    """A dense model of 8 KV heads, 64 KiB of cache a token."""
    base: dict[str, Any] = {
        "id": name,
        "category": "chat",
        "engine": "vllm",
        "source": f"org/{name}",
        "architecture": "LlamaForCausalLM",
        "dtype": "bf16",
        "weights_bytes": int(weights_gib * GIB),
        "layers": 32,
        "attention_heads": 32,
        "kv": KvTerms(65536, 32768, heads=8),
        "context": 32768,
    }
    return ModelNeeds(**{**base, **fields})


def moe(name: str = "moe", **fields: Any) -> ModelNeeds:
    """A mixture of experts with a latent cache: nine tenths of its weights are experts."""
    gib = fields.pop("weights_gib", 100)
    base: dict[str, Any] = {
        "architecture": "DeepseekV3ForCausalLM",
        "dtype": "fp8",
        "expert_bytes": int(0.9 * gib * GIB),
        "experts": 64,
        "experts_per_token": 8,
        "kv": KvTerms(70272, 35136, heads=1, latent=True),
    }
    return dense(name, gib, **{**base, **fields})


def small(name: str, gib: float) -> ModelNeeds:
    """A model with a budget of its own and no KV cache."""
    return ModelNeeds(
        id=name,
        category="image",
        engine="diffusers",
        source=name,
        weights_bytes=1,
        whole_bytes=int(gib * GIB),
    )


def option(gib: float, gpus: int = 1, rank: int = 0, nodes: int = 1) -> Option:
    """So much memory on each of so many GPUs of each node."""
    foot = Footprint((Term("weights", int(gib * GIB), ""),))
    return Option(Layout(tp=gpus), foot, nodes, gpus, rank)
