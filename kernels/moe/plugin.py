"""The vLLM plugin ``hearth_moe``: expert parallelism on a CPU.

vLLM's unquantised CPU experts take the map from global to local experts and do not look at it: with
``--enable-expert-parallel`` on more than one rank their kernel reads weights of experts that are not there.
The plugin replaces their ``apply`` by one that hands the kernel the local (token, expert) pairs only. Without
expert parallelism everything stays as it was.

It patches only what it knows: a vLLM version that it was tried with, whose ``apply`` has the known parameters
and does not read ``expert_map``. Anything else it leaves alone, and says so in the log.
"""

from __future__ import annotations

import dis
import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.moe import load
from kernels.moe.expert_parallel import local_experts
from kernels.moe.on_import import on_import

#: Below vLLM's own logger, whose handlers it has.
logger = logging.getLogger("vllm.hearth_moe")

#: Versions of vLLM (major, minor) whose CPU experts were tried with this.
KNOWN_VERSIONS = ((0, 32),)
MODULE = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
CLASS = "CPUUnquantizedExperts"
PARAMETERS = (
    "self",
    "output",
    "hidden_states",
    "w1",
    "w2",
    "topk_weights",
    "topk_ids",
    "activation",
    "global_num_experts",
    "expert_map",
    "a1q_scale",
    "a2_scale",
    "workspace13",
    "workspace2",
    "expert_tokens_meta",
    "apply_router_weight_on_input",
)
_MARK = "hearth_moe_original"


@dataclass(frozen=True)
class Layer:
    """A layer of experts that was loaded in this process."""

    experts: weakref.ref[Any]
    name: str


#: By number: a custom operator takes numbers, not objects.
_layers: list[Layer] = []
#: Definitions of operators end with their library.
_libraries: list[Any] = []


def register() -> None:
    """What vLLM calls in each of its processes; again and again does no harm.

    The module of the experts takes seconds to import and most processes never need it, so the patch waits
    until somebody imports it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    on_import(MODULE, patch)


def patch(module: ModuleType) -> bool:
    """Patches the experts of vLLM's module; whether they are (now or already) ours."""
    experts = getattr(module, CLASS, None)
    if experts is not None and hasattr(experts, _MARK):
        return True
    from vllm import __version__ as version

    reason = refusal(experts, version)
    if reason is not None:
        logger.warning(
            "hearth_moe leaves vLLM %s alone: %s. Expert parallelism on a CPU is then as this vLLM has it; "
            "serve with --no-enable-expert-parallel if it fails.",
            version,
            reason,
        )
        return False
    assert experts is not None
    _define_operator()
    original, loaded = experts.apply, experts.process_weights_after_loading
    setattr(experts, _MARK, original)
    experts.process_weights_after_loading = _remembering(loaded)
    experts.apply = _expert_parallel(original)
    logger.info("hearth_moe: experts of other ranks cost no work on this CPU.")
    return True


def refusal(experts: Any, version: str) -> str | None:
    """Why this class of experts is not to be patched, or None where it is what we know."""
    if experts is None:
        return f"it has no {CLASS}"
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) not in KNOWN_VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_VERSIONS)
        return f"only {known} is known"
    apply = experts.apply
    if tuple(inspect.signature(apply).parameters) != PARAMETERS:
        return f"{CLASS}.apply has other parameters than those known"
    if any("expert_map" in str(step.argval) for step in dis.get_instructions(apply)):
        return f"{CLASS}.apply reads expert_map by itself"
    return None


def _remembering(loaded: Callable[..., None]) -> Callable[..., None]:
    """``process_weights_after_loading`` that also gives the layer its number."""

    @functools.wraps(loaded)
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        loaded(self, layer)
        self.hearth_layer = len(_layers)
        _layers.append(Layer(weakref.ref(self), str(getattr(layer, "layer_name", len(_layers)))))

    return process_weights_after_loading


def _expert_parallel(original: Callable[..., None]) -> Callable[..., None]:
    """``apply`` for the experts of this rank; without a map and without counting it is vLLM's own."""

    @functools.wraps(original)
    def apply(
        self: Any,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        if expert_map is None and not load.counting():
            original(
                self,
                output,
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation,
                global_num_experts,
                expert_map,
                a1q_scale,
                a2_scale,
                workspace13,
                workspace2,
                expert_tokens_meta,
                apply_router_weight_on_input,
            )
            return
        # An operator of its own: vLLM compiles through this call, and a compiler cannot look into a routing
        # whose sizes depend on the data.
        torch.ops.hearth_moe.experts(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            expert_map,
            activation.value,
            global_num_experts,
            apply_router_weight_on_input,
            self.hearth_layer,
        )

    return apply


def _experts(
    output: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_map: Tensor | None,
    activation: str,
    experts: int,
    weighted_input: bool,
    layer: int,
) -> None:
    """The operator ``hearth_moe::experts``: counts, then runs the layer's own kernel on what is here."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    known = _layers[layer]
    instance = known.experts()
    assert instance is not None, f"{known.name} was unloaded"
    if load.counting() and _answers_requests():
        load.record(known.name, ids, experts)

    def kernel(output: Tensor, hidden: Tensor, weights: Tensor, ids: Tensor) -> None:
        # The kernel keeps its own scratch space, and unquantised inputs have no scales.
        none = output.new_empty(0)
        original = getattr(type(instance), _MARK)
        original(
            instance,
            output,
            hidden,
            w1,
            w2,
            weights,
            ids,
            MoEActivation(activation),
            experts,
            None,
            None,
            None,
            none,
            none,
            None,
            weighted_input,
        )

    if expert_map is None:
        kernel(output, hidden, weights, ids)
    else:
        local_experts(output, hidden, weights, ids, expert_map, kernel)


def _answers_requests() -> bool:
    """Whether the tokens are somebody's: runs that warm or measure memory have no attention state."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return not is_forward_context_available() or get_forward_context().attn_metadata is not None


def _define_operator() -> None:
    """Makes ``torch.ops.hearth_moe.experts``, once in a process."""
    if _libraries:
        return
    library_class: Any = torch.library.Library  # torch's own annotations are incomplete here
    library = library_class("hearth_moe", "DEF")
    library.define(
        "experts(Tensor(a!) output, Tensor hidden, Tensor w1, Tensor w2, Tensor weights, Tensor ids, "
        "Tensor? expert_map, str activation, int experts, bool weighted_input, int layer) -> ()"
    )
    library.impl("experts", _experts, "CPU")
    torch.library.register_fake("hearth_moe::experts", lambda *_: None, lib=library)
    _libraries.append(library)
