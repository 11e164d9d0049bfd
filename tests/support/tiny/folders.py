"""Folders of tiny weights, by the model that they stand for."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.support.tiny.flux import tiny_flux
from tests.support.tiny.qwen_image import tiny_qwen_image
from tests.support.tiny.sd3 import tiny_sd3
from tests.support.tiny.sd15 import tiny_sd15
from tests.support.tiny.wan import tiny_wan

SEED = 7

TINY: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "sd15": tiny_sd15,
        "sd3-medium": tiny_sd3,
        "sd3.5-large": partial(tiny_sd3, qk_norm="rms_norm"),
        "sd3.5-large-turbo": partial(tiny_sd3, qk_norm="rms_norm"),
        "flux-dev": tiny_flux,
        "flux-schnell": partial(tiny_flux, guided=False),
        "qwen-image": tiny_qwen_image,
        "wan2.1-t2v-14b": tiny_wan,
    }
)


def save_tiny(model_id: str, folder: Path, *, seed: int = SEED) -> Path:
    """Write a tiny pipeline of the model's class as `from_pretrained` reads it: 64x64 from 8x8 latents."""
    import torch

    # Random weights of this process, and of no test beside.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = TINY[model_id]()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
