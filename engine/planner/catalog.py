"""From the catalog and its profiles to what the planner reckons with."""

from __future__ import annotations

from collections.abc import Iterable

from engine.planner.hardware import Node, parse_nodes
from engine.planner.layout import Want
from engine.planner.needs import EXPERT_BYTES, ActivationTerms, KvTerms, ModelNeeds, routed_expert_bytes
from models.entry import HubSource, LocalSource, ModelEntry
from models.profile import Profile, ProfileModel

#: (hidden size, vocabulary, width of a head's key and value under MLA) by architecture and parameters in
#: billions, where one class serves several sizes. From transformers 5.19's default configurations (which are
#: the published models'), and the configurations of Kimi-K2-Thinking and Llama-3.3-70B-Instruct.
_WIDTHS: dict[tuple[str, int], tuple[int, int, int]] = {
    ("DeepseekV3ForCausalLM", 671): (7168, 129_280, 128 + 64 + 128),
    ("DeepseekV32ForCausalLM", 672): (7168, 129_280, 0),
    ("DeepseekV4ForCausalLM", 284): (4096, 129_280, 0),
    ("GlmMoeDsaForCausalLM", 744): (6144, 154_880, 0),
    ("GlmMoeDsaForCausalLM", 743): (6144, 154_880, 0),
    ("GptOssForCausalLM", 117): (2880, 201_088, 0),
    ("GptOssForCausalLM", 21): (2880, 201_088, 0),
    ("KimiK25ForConditionalGeneration", 1027): (7168, 163_840, 128 + 64 + 128),
    ("LlamaForCausalLM", 71): (8192, 128_256, 0),
}
#: Options of an engine that the plan decides, or that it hands on in another place.
_RECKONED = ("args", "kv_cache_bytes", "reserve_bytes")
#: Published with a draft layer that vLLM skips on loading (`deepseek_v2.py`: get_spec_layer_idx…).
_DRAFTED = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
#: vLLM's class keeps one latent for all heads although it is written as one KV head.
_LATENT = ("DeepseekV4ForCausalLM",)


def needs_of(entry: ModelEntry) -> ModelNeeds:
    """What an entry says, in the planner's terms; what it does not say stays unknown."""
    dtype = _dtype(entry.dtype)
    experts = entry.experts
    expert_bytes: int | None = 0
    if experts is not None:
        known = entry.parameters is not None and entry.active_parameters is not None
        expert_bytes = (
            routed_expert_bytes(
                entry.parameters or 0, entry.active_parameters or 0, experts.count, experts.per_token, dtype
            )
            if known
            else None
        )
    return ModelNeeds(
        id=entry.id,
        category=entry.category,
        engine=entry.engine,
        source=_source(entry),
        architecture=entry.architecture,
        dtype=dtype,
        weights_bytes=entry.weights_bytes,
        expert_bytes=expert_bytes,
        draft_bytes=_draft_bytes(entry),
        experts=experts.count if experts else 0,
        experts_per_token=experts.per_token if experts else 0,
        layers=entry.kv.layers if entry.kv else None,
        attention_heads=entry.attention_heads,
        kv=_kv(entry),
        activation=_activation(entry),
        context=entry.context_length,
        whole_bytes=None if entry.engine == "vllm" else entry.memory_bytes or None,
        arguments={key.replace("_", "-"): value for key, value in entry.options.get("args", {}).items()},
        options={key: value for key, value in entry.options.items() if key not in _RECKONED},
        aliases=tuple(entry.aliases),
        capabilities=tuple(entry.capabilities),
    )


def wants_of(profile: Profile) -> list[Want]:
    """A profile's models as wants."""
    return [want_of(model) for model in profile.models]


def want_of(model: ProfileModel) -> Want:
    """One model of a profile as a want, with what its options fix of layout and cache."""
    given = {str(key).replace("_", "-"): value for key, value in model.options.get("args", {}).items()}
    kv_dtype = model.kv_dtype
    if kv_dtype == "auto" and str(given.get("kv-cache-dtype", "")).startswith("fp8"):
        kv_dtype = "fp8"
    return Want(
        model=model.id,
        replicas=model.replicas,
        most=model.max_replicas or model.replicas,
        context=model.context_length,
        concurrency=model.concurrency,
        max_batch=model.max_batch,
        priority=model.priority,
        tier=model.tier,
        memory_bytes=model.memory_bytes,
        kv_bytes=model.options.get("kv_cache_bytes"),
        kv_dtype=kv_dtype,
        eplb=model.eplb,
        tensor_parallel=given.get("tensor-parallel-size"),
    )


def nodes_of(profile: Profile) -> list[Node]:
    """The nodes that a profile is made for; empty when it names none."""
    return parse_nodes(profile.needs.nodes) if profile.needs.nodes else []


def needs_of_all(entries: Iterable[ModelEntry]) -> dict[str, ModelNeeds]:
    """Needs by id."""
    return {entry.id: needs_of(entry) for entry in entries}


def _dtype(words: str) -> str:
    """The experts' format, which comes first in the catalog's words; '' = unknown."""
    first = words.split(" ")[0].split("/")[0].strip().lower()
    return {"mxfp4": "fp4"}.get(first, first)


def _source(entry: ModelEntry) -> str:
    for source in entry.sources:
        if isinstance(source, HubSource):
            return source.repo
        if isinstance(source, LocalSource):
            return source.path
    return entry.id


def _kv(entry: ModelEntry) -> KvTerms | None:
    kv = entry.kv
    if kv is None:
        return None
    latent = kv.is_mla or entry.architecture in _LATENT
    if not latent and kv.kv_heads is None:
        return None
    extra = kv.indexer_bytes_per_token
    fp8 = kv.fp8_bytes_per_token or kv.bytes_per_token / 2
    return KvTerms(
        token_bytes=kv.bytes_per_token + extra,
        fp8_token_bytes=fp8 + extra,
        heads=1 if latent else kv.kv_heads or 1,
        latent=latent,
        sequence_bytes=kv.sliding.bytes_per_sequence if kv.sliding else 0,
    )


def _draft_bytes(entry: ModelEntry) -> int:
    """What published fp8 files hold beyond the parameters (two tables in 16 bits): an MTP layer."""
    widths = _activation(entry)
    if entry.architecture not in _DRAFTED or entry.dtype != "fp8" or widths is None:
        return 0
    tables = 2 * widths.hidden * widths.vocabulary
    main = int((entry.parameters or 0) * EXPERT_BYTES["fp8"]) + tables
    return max(0, (entry.weights_bytes or 0) - main)


def _activation(entry: ModelEntry) -> ActivationTerms | None:
    billions = round((entry.parameters or 0) / 1e9)
    widths = _WIDTHS.get((entry.architecture, billions))
    return ActivationTerms(*widths) if widths else None
