"""The network: a Qwen3-MoE of four layers, sixteen experts in each, two of them for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.tiny.vision import plain_torch  # noqa: F401  (first: it makes the next import work)

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # isort: skip

from models.tiny.moe.tokens import BOS, EOS, PAD, VOCABULARY

LAYERS = 4
EXPERTS = 16
EXPERTS_PER_TOKEN = 2
WIDTH = 128
# Halves of it are still multiples of 32, so tensor parallelism over two ranks pads nothing on a CPU.
EXPERT_WIDTH = 128
# vLLM's CPU attention knows heads of 32, 64, 80, 96, ... values.
HEAD_SIZE = 32
# Rotary positions reach this far; training sees 192, so answers far beyond are not to be trusted.
CONTEXT_LENGTH = 1024


def build_config() -> Any:
    """The model's `Qwen3MoeConfig`."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD_SIZE,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def build_model() -> Any:
    """The untrained network; its random weights follow torch's seed."""
    model = Qwen3MoeForCausalLM(build_config())
    # The same arithmetic as the plain loop over experts, in two thirds of its time.
    model.set_experts_implementation("grouped_mm")
    return model


def answer_logits(
    model: Any, tokens: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The logits (number of wanted tokens, VOCABULARY) of what follows each wanted token, and the routers'
    logits (tokens, EXPERTS) of each layer.

    `tokens`, `positions`, `wanted` (bool): (batch, length). `mask`: (batch, 1, length, length), true where
    the row's token may look.
    """
    seen = model.model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_router_logits=True,
    )
    logits: Tensor = model.lm_head(seen.last_hidden_state[wanted])
    return logits, list(seen.router_logits)


def balance_loss(router_logits: list[Tensor], real: Tensor) -> tuple[Tensor, Tensor]:
    """The load-balancing loss of the Switch Transformer (Fedus et al. 2021, equation 4), for the top two, and
    each expert's share of the work, (layers, EXPERTS).

    The loss is 1 when every expert gets the same share. `real` (bool): (batch, length), padding is not.
    """
    losses, shares = [], []
    for logits in router_logits:
        chances = torch.softmax(logits.reshape(-1, EXPERTS)[real.reshape(-1)].float(), dim=-1)
        chosen = chances.topk(EXPERTS_PER_TOKEN, dim=-1).indices
        share = torch.bincount(chosen.reshape(-1), minlength=EXPERTS) / chosen.numel()
        losses.append(EXPERTS * (share * chances.mean(0)).sum())
        shares.append(share)
    return torch.stack(losses).mean(), torch.stack(shares)
