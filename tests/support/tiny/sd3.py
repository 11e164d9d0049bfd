"""A tiny Stable Diffusion 3, and 3.5 with `qk_norm`: two CLIP encoders and a T5, joined in one transformer."""

from typing import Any

from tests.support.tiny.parts import (
    WIDTH,
    clip_config,
    clip_tokenizer,
    flow_scheduler,
    picture_vae,
    t5_encoder,
    t5_tokenizer,
)

LATENT_CHANNELS = 16


def tiny_sd3(*, qk_norm: str | None = None) -> Any:
    import diffusers
    from transformers import CLIPTextModelWithProjection

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm=qk_norm,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(shift=3.0),
        vae=picture_vae(latent_channels=LATENT_CHANNELS, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )
