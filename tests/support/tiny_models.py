"""A Stable Diffusion XL pipeline of the real classes with random weights, in a folder: half a megabyte, no download."""

import string
from pathlib import Path
from typing import Any

LATENT_CHANNELS = 4
TOKENS = 77


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
            projection_class_embeddings_input_dim=6 * 8 + 32,
            cross_attention_dim=64,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=LATENT_CHANNELS,
            force_upcast=force_upcast,
        )
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(_text_config()),
            text_encoder_2=CLIPTextModelWithProjection(_text_config()),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
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


def _text_config() -> Any:
    from transformers import CLIPTextConfig

    tokenizer = _tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer() -> Any:
    """Letters as tokens."""
    from transformers import CLIPTokenizer

    pieces = [
        *string.ascii_lowercase,
        *(f"{letter}</w>" for letter in string.ascii_lowercase),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=TOKENS)
