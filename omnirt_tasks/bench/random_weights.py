"""Pipelines of published sizes with random weights: what a step costs does not depend on what the weights are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Sizes of the published models; tests count their weights.
SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: Mapping[str, Any] = {
    "sample_size": 1024,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
    "force_upcast": False,  # bf16 reaches as far as fp32, so both sides decode in it
}
TEXT_ENCODER: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SDXL_TEXT_ENCODER_2: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SD15_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
TOKENS_MAX = 77
VOCABULARY: Mapping[str, Any] = {"vocab_size": 49_408, "max_position_embeddings": TOKENS_MAX}
NOISE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def sdxl_sized(device: str) -> Any:
    """A classic pipeline of SDXL's size on the torch device, in bf16, with random weights and letters for words."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with _made_on(device):
        heavy = {
            "unet": diffusers.UNet2DConditionModel(**SDXL_UNET),
            "vae": diffusers.AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, **VOCABULARY)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SDXL_TEXT_ENCODER_2, **VOCABULARY)),
        }
    pipeline = diffusers.StableDiffusionXLPipeline(
        **{name: module.eval() for name, module in heavy.items()},
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd15_sized(device: str) -> Any:
    """A pipeline of Stable Diffusion 1.5's size, made in the same way."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    with _made_on(device):
        heavy = {
            "unet": diffusers.UNet2DConditionModel(**SD15_UNET),
            "vae": diffusers.AutoencoderKL(**{**VAE, "sample_size": 512, "scaling_factor": 0.18215}),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, **VOCABULARY)),
        }
    pipeline = diffusers.StableDiffusionPipeline(
        **{name: module.eval() for name, module in heavy.items()},
        tokenizer=_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# What there is to measure without a download, by the model that it stands for.
SIZED: Mapping[str, Callable[[str], Any]] = {"sdxl-base-1.0": sdxl_sized, "sd15": sd15_sized}


@contextmanager
def _made_on(device: str) -> Iterator[None]:
    """Modules are made in bf16 and on the device while inside: fp32 first would take twice the room."""
    import torch

    usual_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual_dtype)


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=TOKENS_MAX
    )
