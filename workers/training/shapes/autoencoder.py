"""Stage 1: an autoencoder that turns 64x64 pictures into 8x8 latents with 16 channels, and back.

Its latents are drawn towards [-1, 1] and it learns to decode them under noise, so that it draws a
clean edge from latents that are only nearly right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from workers.training.shapes.architecture import Autoencoder, build_autoencoder
from workers.training.shapes.captions import split_subjects
from workers.training.shapes.pictures import SHAPES, SIZES, FloatArray, Subject, mask_bank, paint
from workers.training.shapes.stage import (
    MovingAverage,
    ProgressLines,
    learning_rate,
    load_checkpoint,
    numpy_source,
    save_atomically,
    set_learning_rate,
    torch_source,
)

STAGE = 1
BATCH = 16
PEAK_RATE = 1e-3
FIRST_NOISE, LATENT_NOISE = 0.1, 0.2
"""Standard deviation of the noise that the decoder learns to see through, in latent units: at first, at last."""
NOISE_RISE = (600, 1000)
"""Steps between which the noise rises; with much noise from the start, similar colours are confused for long."""
PLACEMENTS = 96
"""How many placements of each shape and size the training pictures are made from."""


def paint_subjects(subjects: tuple[Subject, ...], chosen: np.ndarray, seed: int, rng: np.random.Generator) -> Tensor:
    """Paint `subjects[i]` for each i in `chosen`, each at a random one of the bank's placements.

    Returns float32 [len(chosen), 3, 64, 64], RGB in [-1, 1].
    """
    bank = mask_bank(seed, PLACEMENTS)
    placements = rng.integers(PLACEMENTS, size=len(chosen))
    pictures: list[FloatArray] = []
    for index, placement in zip(chosen, placements, strict=True):
        subject = subjects[int(index)]
        mask = bank[SHAPES.index(subject.shape), SIZES.index(subject.size), int(placement)]
        pictures.append(paint(mask, subject.colour, subject.background))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2.0 - 1.0


def train_autoencoder(seed: int, steps: int, checkpoint: Path) -> Autoencoder:
    """Train the autoencoder, or go on from `checkpoint`, and return its averaged weights in eval mode.

    `steps` are batches of `BATCH` pictures. The same seed and steps give the same weights on the
    same machine with one torch thread, also when the run was interrupted.
    """
    torch.manual_seed(seed * 16 + STAGE)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    average = MovingAverage(model, 0.995)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    first = 0
    if (state := load_checkpoint(checkpoint)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.shadow, average.steps = state["average"], state["step"]
        first = state["step"]
    subjects, _ = split_subjects(seed)
    lines = ProgressLines("autoencoder", steps, first=first)
    for step in range(first, steps):
        rng, source = numpy_source(seed, STAGE, step), torch_source(seed, STAGE, step)
        pictures = paint_subjects(subjects, rng.integers(len(subjects), size=BATCH), seed, rng)
        set_learning_rate(optimizer, learning_rate(step, steps, PEAK_RATE, warmup=50, decay_share=0.5))
        loss = _loss(model, pictures.to(memory_format=torch.channels_last), _noise_level(step), source)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        lines.step(step, loss.item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_atomically(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.shadow,
                    "step": step + 1,
                },
                checkpoint,
            )
    average.copy_to(model)
    return model.to(memory_format=torch.contiguous_format).eval()


def _noise_level(step: int) -> float:
    return float(np.interp(step, NOISE_RISE, (FIRST_NOISE, LATENT_NOISE)))


def _loss(model: Autoencoder, pictures: Tensor, noise: float, source: torch.Generator) -> Tensor:
    posterior = model.encode(pictures).latent_dist
    mean: Tensor = posterior.mean
    noisy = mean + noise * torch.randn(mean.shape, generator=source)
    drawn: Tensor = model.decode(noisy).sample
    outside = functional.relu(mean.abs() - 1.0).pow(2).mean()
    # The posterior's width is a constant by choice; teach the encoder to say so.
    width = (posterior.logvar - 2.0 * float(np.log(LATENT_NOISE))).pow(2).mean()
    loss: Tensor = (
        functional.l1_loss(drawn, pictures) + 4.0 * functional.mse_loss(drawn, pictures) + outside + 1e-3 * width
    )
    return loss
