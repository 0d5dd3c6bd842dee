"""The network: a CLIP vision tower, a projector and a Llama, in the layout that LLaVA gave its name to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.tiny.vision import plain_torch  # noqa: F401  (first: it makes the next import work)

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration  # isort: skip

from models.tiny.vision.drawing import GRID, IMAGE_SIZE, PATCH_SIZE
from models.tiny.vision.palette import COLOURS
from models.tiny.vision.scenes import MAX_COUNT, SHAPES
from models.tiny.vision.tokens import ASSISTANT, BOS, EOS, IMAGE, PAD, USER, VOCABULARY

IMAGE_TOKENS = GRID * GRID
# Rotary positions reach this far; training sees a few hundred, so answers far beyond are not to be trusted.
CONTEXT_LENGTH = 2048
VISION_WIDTH = 128
TEXT_WIDTH = 128
# vLLM's CPU attention knows heads of 32, 64, 80, 96, ... values.
HEAD_SIZE = 32


def build_config() -> Any:
    """The model's `LlavaConfig`."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=VISION_WIDTH // HEAD_SIZE,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=VISION_WIDTH,
        hidden_act="gelu_pytorch_tanh",
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=TEXT_WIDTH // HEAD_SIZE,
        num_key_value_heads=TEXT_WIDTH // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        # The last layer, without its final norm and without the class token: one vector a patch.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def build_model() -> Any:
    """An untrained `LlavaForConditionalGeneration`, in float32."""
    return LlavaForConditionalGeneration(build_config())


def to_input(pixels: Tensor) -> Tensor:
    """Pictures (batch, height, width, 3) of 0..255 as the vision tower takes them: (batch, 3, height,
    width), -1..1."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


# In the order of batches.LABELS. Shape and colour are averaged over all patches though few show a shape;
# three brings them level with the counts, which are averaged over those that do.
_LABEL_WEIGHTS = (3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


class PatchReader(nn.Module):
    """Training only: says from each patch's vector what the patch shows and how many shapes of the picture
    are like it, which teaches the tower to see and to count.

    Learning shapes and numbers from the words of answers alone takes many times longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(VISION_WIDTH)
        counts = 1 + MAX_COUNT
        # In the order of batches.LABELS.
        self.sizes = [1 + len(SHAPES), 1 + len(COLOURS), 2, len(COLOURS), counts, counts, counts, counts]
        self.heads = nn.Linear(VISION_WIDTH, sum(self.sizes))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropies, (len(LABELS),).

        `features`: (batch, IMAGE_TOKENS, VISION_WIDTH). `labels`: (batch, len(LABELS), IMAGE_TOKENS), -100
        where there is nothing to learn.
        """
        logits = self.heads(self.norm(features)).float().split(self.sizes, dim=-1)
        losses = [
            nn.functional.cross_entropy(part.flatten(0, 1), labels[:, index].flatten(), ignore_index=-100)
            for index, part in enumerate(logits)
        ]
        return torch.stack(losses)

    def total(self, losses: Tensor) -> Tensor:
        """The losses as one number to learn from."""
        return losses @ torch.tensor(_LABEL_WEIGHTS, dtype=losses.dtype)


def patch_features(model: Any, images: Tensor) -> Tensor:
    """The vision tower's vectors (batch, IMAGE_TOKENS, VISION_WIDTH) of images (batch, 3, IMAGE_SIZE,
    IMAGE_SIZE)."""
    features: Tensor = model.model.vision_tower(images).last_hidden_state[:, 1:]
    return features


def answer_logits(
    model: Any, features: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor
) -> Tensor:
    """The logits (number of wanted tokens, VOCABULARY) of what follows each wanted token.

    `tokens`, `positions`, `wanted` (bool): (batch, length). `mask`: (batch, 1, length, length), true
    where the row's token may look. The image's vectors stand at [:, 2 : 2 + IMAGE_TOKENS], after BOS and
    the user's mark.
    """
    text = model.model.language_model
    embedded = text.embed_tokens(tokens)
    seen = model.model.multi_modal_projector(features)
    embedded = torch.cat([embedded[:, :2], seen.to(embedded.dtype), embedded[:, 2 + IMAGE_TOKENS :]], dim=1)
    hidden = text(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False)
    logits: Tensor = model.lm_head(hidden.last_hidden_state[wanted])
    return logits


def special_ids() -> dict[str, int]:
    """The ids that the template's marks have."""
    return {"bos": BOS, "eos": EOS, "pad": PAD, "image": IMAGE, "user": USER, "assistant": ASSISTANT}
