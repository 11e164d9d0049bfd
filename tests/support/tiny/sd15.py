"""A tiny Stable Diffusion 1.5: 64x64 pictures from 8x8 latents."""

from typing import Any

from tests.support.tiny.parts import WIDTH, clip_config, clip_tokenizer, picture_vae

LATENT_CHANNELS = 4


def tiny_sd15() -> Any:
    import diffusers
    from transformers import CLIPTextModel

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )
    return diffusers.StableDiffusionPipeline(
        vae=picture_vae(latent_channels=LATENT_CHANNELS),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
