"""Stage 3: the SDXL denoiser, trained on latents and embeddings computed once and kept in memory.

v-prediction on a schedule that ends in pure noise, so that flat backgrounds come out as asked.
Some captions are replaced by zeros and some by the empty text, the two ways in which the SDXL
pipelines ask for a picture without a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from workers.training.shapes.architecture import Autoencoder, Denoiser, build_denoiser, build_scheduler
from workers.training.shapes.autoencoder import paint_subjects
from workers.training.shapes.captions import split_subjects, varied_caption
from workers.training.shapes.pictures import SIDE
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
from workers.training.shapes.text import TextModels

STAGE = 3
BATCH = 64
PEAK_RATE = 1e-3
WARMUP = 200
DECAY_SHARE = 0.35
PICTURES_PER_SUBJECT = 12
CAPTIONS_PER_SUBJECT = 6
ZEROED, EMPTIED = 0.10, 0.03
"""Share of captions replaced by zero embeddings, and by the empty text."""
FIRST_TIMESTEP = 16
"""The least noisy timestep that is trained; forty trailing steps end at 24."""
TIME_IDS = (SIDE, SIDE, 0, 0, SIDE, SIDE)
"""SDXL's original size, crop corner and target size, in pixels, as the pipelines fill them for 64x64."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Everything the denoiser learns from, by subject.

    `latents`: float32 [subjects, pictures, 16, 8, 8], scaled to unit deviation; `hidden`: float32
    [subjects, captions, 32, 128]; `pooled`: float32 [subjects, captions, 34]; `empty_hidden`,
    `empty_pooled`: the same for the empty text, without the first two axes. `scaling_factor`: what
    the raw latents were multiplied by.
    """

    latents: Tensor
    hidden: Tensor
    pooled: Tensor
    empty_hidden: Tensor
    empty_pooled: Tensor
    scaling_factor: float


@torch.no_grad()
def fill_bank(seed: int, autoencoder: Autoencoder, text: TextModels) -> Bank:
    """Draw, encode and caption every training subject several times; the seed decides everything."""
    subjects, _ = split_subjects(seed)
    rng = numpy_source(seed, STAGE, 0)
    latents = torch.empty(len(subjects), PICTURES_PER_SUBJECT, 16, SIDE // 8, SIDE // 8)
    hidden, pooled = [], []
    for index, subject in enumerate(subjects):
        pictures = paint_subjects(subjects, np.full(PICTURES_PER_SUBJECT, index), seed, rng)
        latents[index] = autoencoder.encode(pictures).latent_dist.mean
        captions = [varied_caption(subject, rng)[0] for _ in range(CAPTIONS_PER_SUBJECT)]
        caption_hidden, caption_pooled = text.embed(captions)
        hidden.append(caption_hidden)
        pooled.append(caption_pooled)
    empty_hidden, empty_pooled = text.embed([""])
    factor = round(1.0 / float(latents.std()), 4)
    return Bank(latents * factor, torch.stack(hidden), torch.stack(pooled), empty_hidden[0], empty_pooled[0], factor)


def train_denoiser(seed: int, steps: int, bank: Bank, checkpoint: Path) -> Denoiser:
    """Train the denoiser, or go on from `checkpoint`, and return its averaged weights in eval mode.

    `steps` are batches of `BATCH`. A run that is resumed before its rate falls may be given other
    `steps` and still equals an unbroken run of that many; the same seed and steps give the same
    weights on the same machine with one torch thread.
    """
    torch.manual_seed(seed * 16 + STAGE)
    model = build_denoiser().to(memory_format=torch.channels_last).train()
    average = MovingAverage(model, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    first = 0
    if (state := load_checkpoint(checkpoint)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.shadow, average.steps = state["average"], state["step"]
        first = state["step"]
    signal = build_scheduler().alphas_cumprod
    lines = ProgressLines("denoiser", steps, first=first, every=100)
    for step in range(first, steps):
        rate = learning_rate(step, steps, PEAK_RATE, warmup=WARMUP, decay_share=DECAY_SHARE)
        set_learning_rate(optimizer, rate)
        loss = _loss(model, bank, signal, torch_source(seed, STAGE, step + 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        lines.step(step, loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
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


def _loss(model: Denoiser, bank: Bank, signal: Tensor, source: torch.Generator) -> Tensor:
    subjects, pictures, captions = (
        torch.randint(count, (BATCH,), generator=source)
        for count in (len(bank.latents), PICTURES_PER_SUBJECT, CAPTIONS_PER_SUBJECT)
    )
    clean = bank.latents[subjects, pictures]
    hidden, pooled = bank.hidden[subjects, captions], bank.pooled[subjects, captions]
    chance = torch.rand(BATCH, generator=source)
    zeroed, emptied = chance < ZEROED, (chance >= ZEROED) & (chance < ZEROED + EMPTIED)
    hidden[zeroed], pooled[zeroed] = 0.0, 0.0
    hidden[emptied], pooled[emptied] = bank.empty_hidden, bank.empty_pooled
    # One timestep from each of BATCH equal slices: less noise in the loss than BATCH free draws.
    places = (torch.arange(BATCH) + torch.rand(BATCH, generator=source)) / BATCH
    timesteps = (FIRST_TIMESTEP + places * (len(signal) - FIRST_TIMESTEP)).long()
    kept = signal[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=source)
    noisy = kept.sqrt() * clean + (1.0 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1.0 - kept).sqrt() * clean
    time_ids = torch.tensor(TIME_IDS, dtype=torch.float32).expand(BATCH, -1)
    predicted: Tensor = model(
        noisy.to(memory_format=torch.channels_last),
        timesteps,
        hidden,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    return functional.mse_loss(predicted, velocity)
