"""Writes the trained parts as a diffusers folder that loads without a network."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from workers.training.shapes.architecture import Autoencoder, Denoiser, build_scheduler
from workers.training.shapes.text import TextModels

WEIGHTS = Path(__file__).parents[3] / "omnirt_tasks" / "models" / "weights" / "shapes"
"""Where the product looks for the model."""


def write_folder(
    destination: Path,
    *,
    autoencoder: Autoencoder,
    scaling_factor: float,
    text: TextModels,
    denoiser: Denoiser,
) -> None:
    """Write a `StableDiffusionXLPipeline` in fp16 safetensors.

    Files of the same names in `destination` are replaced, others (the model's card) stay. The parts
    that are passed in keep their dtype. The JSON files hold no path of this machine.
    """
    tokenizer = text.unused_tokenizer()
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=text.first,
        text_encoder_2=text.second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=denoiser,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    autoencoder.register_to_config(scaling_factor=scaling_factor)
    with tempfile.TemporaryDirectory() as scratch:
        # A full-precision copy first: halving in place would change the caller's parts.
        pipeline.save_pretrained(scratch, safe_serialization=True)
        halved = StableDiffusionXLPipeline.from_pretrained(
            scratch, dtype=torch.float16, local_files_only=True, add_watermarker=False
        )
        halved.save_pretrained(destination, safe_serialization=True)
    for path in destination.rglob("*.json"):
        _drop_paths(path)
    for path in destination.rglob("*.safetensors"):
        path.chmod(0o644)  # written for its owner alone; a worker may run as somebody else


def _drop_paths(path: Path) -> None:
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
        kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
