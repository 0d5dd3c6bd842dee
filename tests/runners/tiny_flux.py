"""Saves a FLUX pipeline with random weights, cut very small: ``python -m tests.runners.tiny_flux FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import models.tiny.vision.plain_torch  # noqa: F401 - must come before diffusers and transformers
from models.tiny.image import networks


def save_flux(folder: Path) -> None:
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = len(networks.vocabulary())
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=1,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=1.5,
        ),
        text_encoder=networks.build_text_encoder(),
        tokenizer=networks.build_tokenizer(),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=words, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        ),
        tokenizer_2=networks.build_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=128,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    ).save_pretrained(folder)


if __name__ == "__main__":
    save_flux(Path(sys.argv[1]))
