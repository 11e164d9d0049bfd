"""The parts of the model before training: autoencoder, denoiser, scheduler.

diffusers' classes carry no types, so here, and only here, they become `Any`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from workers.training.shapes.pictures import SIDE
from workers.training.shapes.text import CODE_SIZES, WIDTH

Autoencoder: TypeAlias = Any
"""A `diffusers.AutoencoderKL`."""

Denoiser: TypeAlias = Any
"""A `diffusers.UNet2DConditionModel`."""

Scheduler: TypeAlias = Any
"""A `diffusers.DDIMScheduler`."""

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
"""Settings shared by training and drawing: v-prediction, ending in pure noise."""


def build_scheduler() -> Scheduler:
    """Make the scheduler that ships with the model.

    It does not clip: diffusers' DDIM would bound the latents but not the noise that belongs to
    them, which spoils pictures under strong guidance.
    """
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True)


def build_autoencoder() -> Autoencoder:
    """Make the untrained autoencoder; its weights follow torch's global seed."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_denoiser() -> Denoiser:
    """Make the untrained denoiser; its weights follow torch's global seed."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=16,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=sum(CODE_SIZES) + 6 * 8,
    )
