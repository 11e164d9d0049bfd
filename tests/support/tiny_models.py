"""A Stable Diffusion XL pipeline of the real classes with random weights, in a folder: half a megabyte, no download."""

from pathlib import Path
from typing import Any

from tests.support.tiny.parts import WIDTH, clip_config, clip_tokenizer, picture_vae

LATENT_CHANNELS = 4


def save_tiny_sdxl(folder: Path, *, force_upcast: bool = False, seed: int = 7) -> Path:
    """Write the folder as `from_pretrained` reads it: 64x64 pictures from 8x8 latents."""
    tiny_sdxl(force_upcast=force_upcast, seed=seed).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_sdxl(*, force_upcast: bool = False, seed: int = 7) -> Any:
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    # Random weights of this process, and of no test beside.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            cross_attention_dim=2 * WIDTH,
        )
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=picture_vae(latent_channels=LATENT_CHANNELS, force_upcast=force_upcast),
            text_encoder=CLIPTextModel(clip_config()),
            text_encoder_2=CLIPTextModelWithProjection(clip_config()),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
