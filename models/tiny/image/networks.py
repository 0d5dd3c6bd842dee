"""The parts of the tiny pipeline: tokenizer, text encoder, autoencoder, denoiser, scheduler.

Together they are a diffusers `StableDiffusionPipeline`: a CLIP text encoder, a UNet with
cross-attention in the latents of an `AutoencoderTiny` (8 pixels to one latent), trained with
flow matching (Lipman et al. 2023; Liu et al. 2023).
"""

from __future__ import annotations

import re
from typing import Any

from models.tiny.image.captions import every_training_word
from models.tiny.image.drawing import COLOURS, SHAPES

LATENT_CHANNELS = 8
MAX_TOKENS = 32


def vocabulary() -> dict[str, int]:
    """Every word of the training captions; what only held-out wordings use is unknown."""
    text = " ".join(sorted(every_training_word()))
    words = sorted(set(re.findall(r"[a-z]+|[^\w\s]", re.sub(r"\{\w+\}", " ", text))))
    specials = ["<pad>", "<unk>", "<start>", "<end>"]
    return {word: index for index, word in enumerate(dict.fromkeys([*specials, *words, *COLOURS, *SHAPES]))}


def build_tokenizer() -> Any:
    """A word-level tokenizer that takes any text; unknown words become `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = vocabulary()
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[("<start>", vocab["<start>"]), ("<end>", vocab["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocab = vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=128,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=vocab["<pad>"],
            bos_token_id=vocab["<start>"],
            eos_token_id=vocab["<end>"],
        )
    )


def build_autoencoder() -> Any:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(2, 2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def build_denoiser() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=(128, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """Second-order DPM-Solver over the straight paths of flow matching."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, steps_offset=1
    )
