"""A rank's share of the experts against the plain reference, through vLLM's own CPU kernel.

Tolerances: results are of order one. In float32 the kernel's sums differ from float64 ones by less than 1e-5.
In bfloat16 (8 bits) it rounds between the two products, each pair's result and the sum: 3e-2.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot, silu

from kernels.moe.expert_parallel import Kernel, local_experts
from kernels.moe.reference import experts_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
DTYPES = tuple(TOLERANCE)


@dataclass
class Spy:
    """A kernel that writes down what it is given, then runs another."""

    kernel: Kernel
    experts: int
    calls: list[int] = field(default_factory=list)

    def __call__(self, out: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        assert ids.dtype == torch.int32
        assert all(tensor.is_contiguous() for tensor in (out, hidden, weights, ids))
        assert out.shape == hidden.shape
        assert weights.shape == ids.shape == (len(hidden), ids.shape[1])
        assert int(ids.min()) >= 0
        assert int(ids.max()) < self.experts
        self.calls.append(ids.numel())
        self.kernel(out, hidden, weights, ids)


@dataclass(frozen=True)
class Case:
    """A layer and a batch for it."""

    hidden: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor

    @property
    def experts(self) -> int:
        return len(self.w13)

    def reference(self, expert_map: Tensor | None = None) -> Tensor:
        """What the rank with this map adds; its weights are chosen here."""
        w13, w2 = self.w13, self.w2
        if expert_map is not None:
            w13, w2 = w13[owned(expert_map)], w2[owned(expert_map)]
        return experts_reference(self.hidden, w13, w2, self.weights, self.ids, expert_map)

    def share(self, expert_map: Tensor) -> tuple[Tensor, Spy]:
        """Ours, on the rank with this map."""
        w13, w2 = self.w13[owned(expert_map)], self.w2[owned(expert_map)]
        spy = Spy(kernel_of(w13, w2), len(w13))
        # Not zeros: what is not written shows.
        out = torch.full_like(self.hidden, 77.0)
        local_experts(out, self.hidden, self.weights, self.ids, expert_map, spy)
        return out, spy


def owned(expert_map: Tensor) -> Tensor:
    """A rank's experts by their local numbers."""
    here = (expert_map >= 0).nonzero().squeeze(1)
    return here[expert_map[here].argsort()]


def map_of(experts: int, mine: list[int]) -> Tensor:
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
    return expert_map


def load_vllm_kernel() -> bool:
    """vLLM's compiled operators without vLLM, which takes seconds to import; is the kernel among them?"""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return False
    kind = (
        ""
        if torch.cpu._is_avx512_bf16_supported()
        else "_AVX512"
        if torch.cpu._is_avx512_supported()
        else "_AVX2"
    )
    for name in (f"_C{kind}.abi3.so", "_C.abi3.so"):
        if (library := Path(spec.origin).parent / name).exists():
            torch.ops.load_library(str(library))
            break
    return hasattr(torch.ops._C, "cpu_fused_moe")


HAS_VLLM_KERNEL = load_vllm_kernel()


def kernel_of(w13: Tensor, w2: Tensor) -> Kernel:
    """vLLM's kernel over these experts; the reference where vLLM has none for CPUs, as in its CUDA build."""

    def plain(out: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        out.copy_(experts_reference(hidden, w13, w2, weights, ids))

    if not HAS_VLLM_KERNEL or len(w13) == 0:
        return plain
    packed = []
    for weight in (w13, w2):
        packed.append(torch.empty_like(weight))
        torch.ops._C.prepack_moe_weight(weight, packed[-1], "vec")

    def fused(out: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        torch.ops._C.cpu_fused_moe(out, hidden, *packed, None, None, weights, ids, False, "silu", "vec")

    return fused


def make_case(
    seed: int, tokens: int, experts: int, slots: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :slots].to(torch.int32)
    weights = torch.rand(tokens, slots, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return Case(
        x, normal(experts, 2 * intermediate, hidden), normal(experts, hidden, intermediate), weights, ids
    )


@st.composite
def cases(draw: Callable[..., int]) -> Case:
    """Layers and batches of all shapes, top-k 1 to 8, from no token on; some experts are empty by chance."""
    experts = draw(st.integers(1, 12))
    slots = draw(st.integers(1, min(8, experts)))
    hidden, intermediate = 32 * draw(st.integers(1, 3)), 32 * draw(st.integers(1, 2))
    dtype = DTYPES[draw(st.integers(0, 1))]
    return make_case(
        draw(st.integers(0, 2**31)), draw(st.integers(0, 12)), experts, slots, hidden, intermediate, dtype
    )


@st.composite
def splits(draw: Callable[..., object]) -> tuple[Case, list[Tensor]]:
    """A case and its experts spread over one to four ranks: by ranges, or anyhow (a rank may have none)."""
    case = draw(cases())
    assert isinstance(case, Case)
    ranks = draw(st.integers(1, 4))
    assert isinstance(ranks, int)
    owners = draw(
        st.one_of(
            st.just([expert * ranks // case.experts for expert in range(case.experts)]),
            st.lists(st.integers(0, ranks - 1), min_size=case.experts, max_size=case.experts),
        )
    )
    order = draw(st.permutations(range(case.experts)))
    assert isinstance(owners, list)
    assert isinstance(order, list)
    mine = [[expert for expert in order if owners[expert] == rank] for rank in range(ranks)]
    return case, [map_of(case.experts, experts) for experts in mine]


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    limit = TOLERANCE[dtype] * (1.0 + wanted.abs())
    return bool(((found.double() - wanted).abs() <= limit).all())


@given(cases())
@settings(max_examples=30, deadline=None)
def test_the_reference_is_the_dense_formula(case: Case) -> None:
    """Every expert for every token, then the chosen ones weighted: the same sum in other words."""
    x = case.hidden.double()
    gate, up = torch.einsum("eih,th->tei", case.w13.double(), x).chunk(2, dim=2)
    every = torch.einsum("ehi,tei->teh", case.w2.double(), silu(gate) * up)
    chosen = (one_hot(case.ids.long(), case.experts) * case.weights.double()[..., None]).sum(1)
    torch.testing.assert_close(case.reference(), torch.einsum("te,teh->th", chosen, every))


@given(splits())
@settings(max_examples=60, deadline=None)
def test_each_rank_has_its_share_and_their_sum_is_the_whole(split: tuple[Case, list[Tensor]]) -> None:
    case, maps = split
    total = torch.zeros(case.hidden.shape, dtype=torch.float64)
    pairs = 0
    for expert_map in maps:
        out, spy = case.share(expert_map)
        assert close(out, case.reference(expert_map), case.hidden.dtype)
        total += out.double()
        pairs += sum(spy.calls)
    assert close(total, case.reference(), case.hidden.dtype)
    assert pairs == case.ids.numel(), "over the ranks, each pair is worked on once"


@given(splits())
@settings(max_examples=60, deadline=None)
def test_remote_experts_cost_no_work(split: tuple[Case, list[Tensor]]) -> None:
    """The kernel's rows (two matrix products each) are exactly the pairs whose expert is here."""
    case, maps = split
    for expert_map in maps:
        _, spy = case.share(expert_map)
        local = int((expert_map[case.ids.long()] >= 0).sum())
        assert spy.calls == ([local] if local else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mine", [[3], [0, 1, 2], [5, 3, 0]])
def test_all_tokens_to_one_expert(dtype: torch.dtype, mine: list[int]) -> None:
    case = make_case(1, 40, 6, 2, 64, 32, dtype)
    case.ids.fill_(3)
    expert_map = map_of(6, mine)
    out, spy = case.share(expert_map)
    assert close(out, case.reference(expert_map), dtype)
    assert spy.calls == ([80] if 3 in mine else [])


@pytest.mark.parametrize("mine", [[], [0, 1]])
def test_all_remote_gives_zeros_and_calls_nothing(mine: list[int]) -> None:
    case = make_case(2, 5, 6, 3, 32, 32, torch.float32)
    case.ids.clamp_(min=2)
    out, spy = case.share(map_of(6, mine))
    assert out.count_nonzero() == 0
    assert spy.calls == []


def test_no_tokens_at_all() -> None:
    out, spy = make_case(3, 0, 6, 3, 32, 32, torch.bfloat16).share(map_of(6, [0, 4]))
    assert out.shape == (0, 32)
    assert spy.calls == []


def test_tokens_without_a_local_expert_beside_others() -> None:
    case = make_case(4, 6, 4, 2, 32, 32, torch.float32)
    case.ids[:] = torch.tensor([[0, 1], [2, 3], [0, 3], [2, 3], [1, 0], [3, 0]])
    expert_map = map_of(4, [1, 0])
    out, spy = case.share(expert_map)
    assert out[[1, 3]].count_nonzero() == 0
    assert close(out, case.reference(expert_map), torch.float32)
    assert spy.calls == [6]


@pytest.mark.parametrize("tokens", [1, 7])
def test_tokens_with_equally_many_local_experts_are_not_taken_apart(tokens: int) -> None:
    """A single token always: then the kernel sums by itself, rounding once, and nothing is copied."""
    case = make_case(5, tokens, 8, 4, 32, 32, torch.bfloat16)
    case.ids[:] = torch.tensor([[6, 1, 2, 7], [0, 5, 4, 3], [4, 1, 5, 2]])[torch.arange(tokens) % 3]
    expert_map = map_of(8, [0, 1, 2, 3])
    seen: list[tuple[int, ...]] = []

    def kernel(out: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        seen.append(tuple(ids.shape))
        assert hidden.data_ptr() == case.hidden.data_ptr()
        kernel_of(case.w13[:4], case.w2[:4])(out, hidden, weights, ids)

    out = torch.empty_like(case.hidden)
    local_experts(out, case.hidden, case.weights, case.ids, expert_map, kernel)
    assert seen == [(tokens, 2)]
    assert close(out, case.reference(expert_map), torch.bfloat16)


def test_routing_that_is_a_view_and_of_int64() -> None:
    """What a router hands over need not be contiguous, nor int32."""
    case = make_case(6, 9, 8, 3, 32, 32, torch.float32)
    ids = torch.stack((case.ids.long(), case.ids.long()), dim=2)[:, :, 0]
    weights = torch.stack((case.weights, case.weights), dim=2)[:, :, 0]
    viewed = Case(case.hidden, case.w13, case.w2, weights, ids)
    expert_map = map_of(8, [7, 2, 0, 5])
    out, _ = viewed.share(expert_map)
    assert torch.equal(out, case.share(expert_map)[0])


def test_sums_of_bfloat16_round_once() -> None:
    """256 + 1 + 1 + 1 + 1 is 260; summed in bfloat16 itself, each 1 would be lost."""
    ids = torch.tensor([[0, 1, 2, 3, 4], [0, 5, 6, 5, 6]], dtype=torch.int32)
    hidden = torch.ones(2, 32, dtype=torch.bfloat16)
    value = torch.tensor([256.0, 1.0, 1.0, 1.0, 1.0])

    def kernel(out: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        out.copy_(value[ids.long()].expand_as(out))

    out = torch.empty_like(hidden)
    local_experts(out, hidden, torch.ones(2, 5), ids, map_of(7, [0, 1, 2, 3, 4]), kernel)
    assert out[0].eq(260.0).all()
    assert out[1].eq(256.0).all()
