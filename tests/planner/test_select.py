"""Which layouts are tried, and which come first."""

from __future__ import annotations

from typing import Any

import pytest

from engine.planner.layout import Policy, Want
from engine.planner.needs import KvTerms, ModelNeeds
from engine.planner.select import layouts, options
from tests.planner.support import catalog, dense, moe, node, small


def names(
    needs: ModelNeeds, nodes: str, count: int = 1, policy: Policy | None = None, **want: Any
) -> list[str]:
    found = options(needs, Want(needs.id, **want), node(nodes), count, policy or Policy())
    return [option.layout.name() for option in found.options]


def test_the_fewest_gpus_come_first_and_tp_stays_in_its_node() -> None:
    assert names(dense(), "1x8xH200") == ["1 GPU", "TP2", "TP4"]
    assert names(dense(weights_gib=150), "1x8xH200") == ["TP2", "TP4", "TP8"]
    assert names(dense(weights_gib=150), "1x4xL40S", count=2)[0] == "TP4 PP2"


def test_never_more_than_four_times_the_fewest() -> None:
    assert "TP8" not in names(dense(), "1x8xH200")


def test_a_latent_cache_with_experts_takes_dp_attention() -> None:
    assert names(moe(weights_gib=300), "1x8xH200")[0] == "DP4+EP"
    assert names(moe(weights_gib=300), "1x8xH200", policy=Policy(objective="latency"))[0] == "TP4"


def test_int4_experts_stay_under_tensor_parallelism() -> None:
    assert names(moe(weights_gib=300, dtype="int4"), "1x8xH200")[0] == "TP4"


def test_experts_over_few_kv_heads_take_dp_attention_beyond_them() -> None:
    needs = moe(weights_gib=600, expert_bytes=550 << 30, kv=KvTerms(98304, heads=4), attention_heads=64)
    assert names(needs, "1x8xH200")[0] == "TP4xDP2+EP"
    assert names(needs, "1x4xB200") == ["TP4"]


def test_pipeline_only_crosses_nodes_and_wide_ep_only_rdma() -> None:
    big = moe(weights_gib=1500, expert_bytes=1300 << 30)
    assert names(big, "2x8xH200", count=2)[0] == "TP8 PP2"  # dense parts on every rank do not fit
    lean = moe(weights_gib=1000, expert_bytes=980 << 30)
    assert names(lean, "2x8xH200", count=2)[0] == "DP16+EP"
    found = list(layouts(lean, Want("moe"), node("2x8xL40S"), 2, Policy()))
    assert any(layout.name() == "DP16+EP" for layout in found)
    assert names(lean, "4x8xL40S", count=4) == ["TP8 PP4"]
    assert not [layout for layout in found if layout.pp > 1 and layout.gpus <= 8]


def test_wide_ep_has_a_backend_and_balances_its_experts() -> None:
    lean = moe(weights_gib=1000, expert_bytes=980 << 30)
    option = options(lean, Want("moe"), node("2x8xH200"), 2, Policy()).options[0]
    assert option.layout.all2all == "deepep_low_latency" and option.layout.eplb
    # Experts and copies divide evenly among the ranks.
    assert (lean.experts + option.layout.redundant_experts) % option.layout.ep_size == 0
    assert option.layout.redundant_experts > 0
    assert option.nodes == 2 and option.per_node == 8


def test_inside_a_node_vllms_own_backend_serves_and_eplb_is_for_those_who_ask() -> None:
    option = options(moe(weights_gib=300), Want("moe"), node(), 1, Policy()).options[0]
    assert option.layout.all2all == "" and not option.layout.eplb
    asked = options(moe(weights_gib=300), Want("moe", eplb=True), node(), 1, Policy()).options
    assert asked and all(o.layout.eplb and o.layout.ep for o in asked)


def test_a_cache_too_long_for_one_rank_is_split_by_token() -> None:
    long = moe(weights_gib=700, dtype="int4", context=2_000_000)
    # 134 GiB of latent cache: on every rank under TP8, an eighth with DCP.
    assert names(long, "1x8xH200", context=2_000_000) == ["TP8 DCP8"]


def test_the_cache_is_in_the_architectures_own_format() -> None:
    assert names(catalog()["deepseek-v3.2"], "1x8xH200")[0] == "DP8+EP fp8-KV"
    assert names(catalog()["deepseek-r1"], "1x8xH200")[0] == "DP8+EP"
    assert names(catalog()["deepseek-r1"], "1x8xH200", kv_dtype="fp8")[0] == "DP8+EP fp8-KV"


def test_a_fixed_tp_is_kept_and_other_engines_take_one_gpu() -> None:
    assert names(dense(), "1x8xH200", tensor_parallel=4) == ["TP4"]
    assert names(small("picture", 4), "1x8xH200") == ["1 GPU"]


@pytest.mark.parametrize("context", [None, 40_000])
def test_reasons_are_kept_for_the_message(context: int | None) -> None:
    found = options(dense(weights_gib=2000), Want("dense", context=context), node(), 1, Policy())
    assert not found.options
    assert [name for name, _ in found.reasons] == (["context"] if context else ["memory"])
