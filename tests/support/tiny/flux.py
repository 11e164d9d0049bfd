"""A tiny Flux, guided by a number (dev) or not at all (schnell)."""

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


def tiny_flux(*, guided: bool = True) -> Any:
    import diffusers
    from transformers import CLIPTextModel

    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guided,
    )
    return diffusers.FluxPipeline(
        scheduler=flow_scheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
        vae=picture_vae(
            latent_channels=LATENT_CHANNELS,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )
