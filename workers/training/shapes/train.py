"""Runs the three training stages in order and writes the model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from workers.training.shapes.autoencoder import train_autoencoder
from workers.training.shapes.denoiser import fill_bank, train_denoiser
from workers.training.shapes.folder import write_folder
from workers.training.shapes.text import train_text_models


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each stage trains, in batches; the defaults made the shipped weights."""

    seed: int = 7
    autoencoder_steps: int = 1900
    text_steps: int = 1200
    denoiser_steps: int = 6500


def train(plan: Plan, *, destination: Path, checkpoints: Path) -> None:
    """Train the model and write it to `destination`.

    Stages found in the folder `checkpoints` go on from there. Sets torch to one thread, since the
    same plan gives the same weights only with the same number of threads.
    """
    torch.set_num_threads(1)
    text = train_text_models(plan.seed, plan.text_steps, checkpoints / "text.pt")
    autoencoder = train_autoencoder(plan.seed, plan.autoencoder_steps, checkpoints / "autoencoder.pt")
    bank = fill_bank(plan.seed, autoencoder, text)
    denoiser = train_denoiser(plan.seed, plan.denoiser_steps, bank, checkpoints / "denoiser.pt")
    write_folder(
        destination,
        autoencoder=autoencoder,
        scaling_factor=bank.scaling_factor,
        text=text,
        denoiser=denoiser,
    )
