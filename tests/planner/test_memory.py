"""The memory formula, against published figures and against itself."""

from __future__ import annotations

from typing import Any

import pytest

from engine.planner.layout import Layout, Policy, Want
from engine.planner.memory import (
    GIB,
    UNSPLIT_SHARE,
    asked_tokens,
    batched_tokens,
    capacity,
    footprint,
    kv_token_bytes,
)
from engine.planner.needs import routed_expert_bytes
from tests.planner.support import catalog, dense, moe, node, plan, published, small


@pytest.mark.parametrize("case", published("kv_cache"), ids=lambda c: str(c["utilisation"]))
def test_the_published_kv_cache_comes_out_within_five_percent(case: dict[str, Any]) -> None:
    needs, gpu = catalog()[case["model"]], node(case["nodes"]).kind
    layout = Layout(tp=case["tensor_parallel"])
    foot = footprint(needs, Want(needs.id, max_batch=case["max_batch"]), layout, gpu, Policy())
    others = foot.total - foot.kv_bytes - (0 if case["graphs_inside"] else foot.of("CUDA graphs"))
    left = capacity(gpu, case["utilisation"]) - others
    assert left / GIB == pytest.approx(case["available_gib"], rel=0.05)
    assert foot.with_kv(left).kv_tokens == pytest.approx(case["tokens"], rel=0.05)


@pytest.mark.parametrize("case", published("fits"), ids=lambda c: f"{c['model']}-{c['nodes']}")
def test_what_is_published_to_fit_fits_and_nothing_else(case: dict[str, Any]) -> None:
    assert (not plan(case["nodes"], case["model"]).refusals) == case["fits"], case["source"]


def test_kimi_leaves_four_gib_on_an_h100_before_anything_else() -> None:
    gpu = node("1x8xH100").kind
    foot = footprint(catalog()["kimi-k2-6"], Want("k"), Layout(tp=8), gpu, Policy())
    assert (capacity(gpu, 0.92) - foot.of("weights")) / GIB == pytest.approx(4, abs=0.5)


def test_decode_context_parallel_holds_eight_times_the_tokens() -> None:
    needs, gpu = catalog()["kimi-k2-6"], node().kind
    whole = footprint(needs, Want("k"), Layout(tp=8), gpu, Policy()).with_kv(int(46.8 * GIB))
    split = footprint(needs, Want("k"), Layout(tp=8, dcp=8), gpu, Policy()).with_kv(int(46.8 * GIB))
    # The same recipe's log: 715,072 tokens under TP8, 5,721,088 under TP8 with DCP8.
    assert split.kv_tokens / whole.kv_tokens == pytest.approx(5_721_088 / 715_072, rel=1e-3)


def test_the_terms_of_a_replica_are_all_told_and_add_up() -> None:
    foot = footprint(dense(), Want("dense"), Layout(tp=2), node().kind, Policy())
    names = [term.name for term in foot.terms]
    assert names == [
        "weights", "unsplit", "KV cache", "activations", "CUDA context", "communication", "CUDA graphs"
    ]  # fmt: skip
    assert foot.total == sum(term.bytes for term in foot.terms)
    assert foot.of("weights") == 5 * GIB and foot.of("unsplit") == int(5 * GIB * UNSPLIT_SHARE)
    assert all(term.how for term in foot.terms)


def test_tensor_parallelism_divides_the_cache_by_its_heads_at_most() -> None:
    heads8 = dense().kv
    assert heads8 is not None
    assert kv_token_bytes(heads8, Layout(tp=4)) == 65536 / 4
    assert kv_token_bytes(heads8, Layout(tp=8)) == kv_token_bytes(heads8, Layout(tp=16)) == 65536 / 8
    assert kv_token_bytes(heads8, Layout(tp=8, pp=2)) == 65536 / 16
    assert kv_token_bytes(heads8, Layout(kv_dtype="fp8")) == 32768


def test_a_latent_cache_is_the_same_on_every_tensor_parallel_rank() -> None:
    kv = moe().kv
    assert kv is not None
    assert kv_token_bytes(kv, Layout(tp=8)) == kv_token_bytes(kv, Layout()) == 70272


def test_data_parallel_attention_repeats_it_and_spreads_the_experts() -> None:
    needs = moe()
    foot = footprint(needs, Want("moe"), Layout(dp=8, ep=True), node().kind, Policy())
    assert foot.of("weights") == pytest.approx((10 + 90 / 8) * GIB)
    assert foot.with_kv(70272 * 1000).kv_tokens == 8000


def test_each_data_parallel_rank_has_room_for_its_share_of_the_sequences() -> None:
    policy, want = Policy(), Want("moe", context=1024, concurrency=9)
    assert asked_tokens(moe(), want, Layout(), policy) == 9 * 1024 + 256
    assert asked_tokens(moe(), want, Layout(dp=8, ep=True), policy) == 2 * 1024 + 256
    assert asked_tokens(moe(), want, Layout(tp=8, dcp=8), policy) == 9 * 128 + 256


def test_pipeline_stages_share_the_layers_and_the_fullest_counts() -> None:
    needs = dense(weights_gib=61, layers=61)
    foot = footprint(needs, Want("dense"), Layout(pp=2), node().kind, Policy())
    assert foot.of("weights") == pytest.approx(31 * GIB)


def test_redundant_experts_cost_what_one_expert_weighs() -> None:
    layout = Layout(dp=16, ep=True, eplb=True, redundant_experts=32)
    r1 = catalog()["deepseek-r1"]
    foot = footprint(r1, Want("r1"), layout, node().kind, Policy())
    # Published: about 2.4 GB for each redundant expert of DeepSeek-V3; 32 over 16 ranks are two a GPU.
    assert foot.of("redundant experts") / 2 == pytest.approx(2.4e9, rel=0.1)


def test_sliding_windows_are_held_for_every_sequence() -> None:
    gemma, gpu = catalog()["gemma-3-27b-it"], node().kind
    one = footprint(gemma, Want("g", context=8192, concurrency=1), Layout(), gpu, Policy())
    two = footprint(gemma, Want("g", context=8192, concurrency=2), Layout(), gpu, Policy())
    window = 52 * 1024 * 2 * 16 * 128 * 2
    assert two.kv_bytes - one.kv_bytes == pytest.approx(8192 * 81920 + window, abs=2)


def test_expert_bytes_come_from_total_and_active_parameters() -> None:
    # DeepSeek-V3: 58 layers x 256 experts x 3 matrices x 7168 x 2048, one byte each.
    exact = 58 * 256 * 3 * 7168 * 2048
    assert routed_expert_bytes(671.03e9, 37e9, 256, 8, "fp8") == pytest.approx(exact, rel=0.005)
    assert routed_expert_bytes(671e9, 37e9, 256, 8, "") is None
    assert routed_expert_bytes(671e9, 37e9, 8, 8, "fp8") is None


def test_the_draft_layer_of_r1_is_not_loaded() -> None:
    # 11.5 billion parameters at a byte each, and 16-bit copies of both tables.
    tables = 2 * 2 * 7168 * 129280
    assert catalog()["deepseek-r1"].draft_bytes == pytest.approx(11.5e9 + tables, rel=0.05)


def test_other_engines_take_their_budget_or_an_allowance() -> None:
    gpu = node().kind
    foot = footprint(small("picture", 7), Want("picture"), Layout(), gpu, Policy())
    assert foot.total == 7 * GIB and foot.kv_tokens == 0
    fixed = footprint(small("picture", 7), Want("picture", memory_bytes=3 * GIB), Layout(), gpu, Policy())
    assert fixed.total == 3 * GIB


def test_a_pass_has_as_many_tokens_as_vllm_takes_by_default() -> None:
    sizes = {kind: batched_tokens(node(f"1x1x{kind}").kind) for kind in ("B200", "H200", "A100-80", "L40S")}
    assert sizes == {"B200": 16384, "H200": 8192, "A100-80": 2048, "L40S": 2048}
