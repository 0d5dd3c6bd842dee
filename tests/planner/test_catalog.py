"""From catalog entries to needs: nothing invented, nothing lost."""

from __future__ import annotations

import pytest

from engine.planner.catalog import needs_of, wants_of
from models.catalog import load_catalog
from models.profile import Profile, ProfileModel
from tests.planner.support import catalog


def test_r1_comes_with_all_its_figures() -> None:
    needs = catalog()["deepseek-r1"]
    assert needs.source == "deepseek-ai/DeepSeek-R1" and needs.dtype == "fp8"
    assert needs.kv is not None and needs.kv.latent and needs.kv.token_bytes == 70272
    assert needs.attention_heads == 128 and needs.experts == 256 and needs.context == 163840
    assert needs.activation is not None and needs.activation.hidden == 7168
    assert not needs.unknown()


@pytest.mark.parametrize(
    ("model", "fp8"),
    [
        ("deepseek-r1", 70272 / 2),
        # fp8_ds_mla: 656 bytes a layer and token, and the indexer's 132.
        ("deepseek-v3.2", 61 * (656 + 132)),
        ("glm-5", 78 * (656 + 132)),
        ("qwen3-32b", 262144 / 2),
    ],
)
def test_fp8_caches_have_the_size_that_vllm_gives_them(model: str, fp8: float) -> None:
    kv = catalog()[model].kv
    assert kv is not None and kv.fp8_token_bytes == fp8


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("gpt-oss-120b", "fp4"), ("kimi-k2-6", "int4"), ("deepseek-v4-flash", "fp4"), ("qwen3-8b", "bf16")],
)
def test_the_experts_format_is_read_from_the_catalogs_words(model: str, dtype: str) -> None:
    assert catalog()[model].dtype == dtype


@pytest.mark.parametrize(
    "model", ["gpt-oss-120b", "deepseek-v4-flash", "kimi-k2-6", "deepseek-r1", "qwen3-235b-a22b"]
)
def test_experts_are_most_of_a_mixture_and_never_more_than_all(model: str) -> None:
    needs = catalog()[model]
    assert needs.expert_bytes is not None
    assert 0.8 * needs.loaded_bytes < needs.expert_bytes < needs.loaded_bytes


def test_an_entry_without_figures_stays_unknown() -> None:
    entry = (
        load_catalog()
        .find("deepseek-r1")
        .model_copy(update={"weights_bytes": None, "kv": None, "active_parameters": None})
    )
    assert needs_of(entry).unknown() == ["weight bytes", "KV bytes per token", "expert bytes"]


def test_a_profile_becomes_wants() -> None:
    profile = Profile(
        name="p",
        models=[ProfileModel(id="a", replicas=2, context_length=4096, concurrency=3, eplb=True, priority=5)],
    )
    (want,) = wants_of(profile)
    assert (want.model, want.replicas, want.context, want.concurrency) == ("a", 2, 4096, 3)
    assert want.eplb is True and want.priority == 5 and want.kv_dtype == "auto"
