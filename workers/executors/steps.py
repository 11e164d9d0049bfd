"""Counts a job's steps at its own `scheduler.step`, shows how far the picture has come, and keeps its state.

Denoiser calls are not steps: guidance may call twice, Heun twice. The scheduler steps exactly once each.
"""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from workers.checkpoints import CheckpointWriter
from workers.chunks.calls import DeviceCall
from workers.context import JobContext
from workers.executors.denoising_state import run_name, state_after
from workers.executors.pictures import PNG, png_bytes
from workers.executors.replay import Replay

log = logging.getLogger(__name__)

PREVIEW_SIDE_PX = 64


def count_steps(
    scheduler: Any, vae: Any, job: JobContext, generators: Sequence[torch.Generator], checkpoints: CheckpointWriter
) -> None:
    """Wrap the step of the job's own scheduler: progress, cancel, previews, checkpoints, facts of the last latents.

    `generators` are the job's own, whose state a checkpoint keeps; from one, the run goes on if its order has one.
    """
    original = scheduler.step
    run = run_name(job.order, scheduler)
    replay = Replay(job, scheduler, generators, run)
    done = total = 0
    previews = hasattr(vae, "decode")

    @functools.wraps(original)  # pipelines look for `generator` in its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done, total, previews
        job.check()
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if not done:
            total = steps_of_run(scheduler, timestep)
        done += 1
        if replay.under_way:
            return replay.passed(done)
        result = original(*args, **kwargs)
        if done == 1 and replay.begins(total, result):
            return replay.passed(done)
        job.step(done, total, float(timestep))
        if done == total:
            job.latent_stats = _stats(result[0])
        elif previews and job.wants_preview(done, total):
            previews = _show(_predicted(result), vae, job, done)
        checkpoints.after(done, total, lambda: state_after(done, total, result[0], scheduler, generators, run).encode())
        return result

    scheduler.step = step


def steps_of_run(scheduler: Any, first_timestep: Any) -> int:
    """How many steps a run takes that begins at this timestep: a strength below 1 begins later."""
    timesteps = scheduler.timesteps
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:  # schedulers that keep no index begin where the timestep stands
        places = (timesteps == first_timestep).nonzero()
        begin = int(places[0]) if len(places) else 0
    return len(timesteps) - begin


def _predicted(result: Any) -> torch.Tensor:
    """The picture as the scheduler foresees it, if it does, else the latents as they are."""
    tensor: torch.Tensor
    if isinstance(result, tuple):
        tensor = result[1] if len(result) > 1 and isinstance(result[1], torch.Tensor) else result[0]
    else:
        foreseen = getattr(result, "pred_original_sample", None)
        tensor = result.prev_sample if foreseen is None else foreseen
    return tensor


def _show(latents: torch.Tensor, vae: Any, job: JobContext, step: int) -> bool:
    """Send a preview; false if this model's latents cannot be shown. A preview never fails its job."""
    if latents.ndim != 4 or latents.shape[1] != getattr(vae.config, "latent_channels", None):
        return False
    try:
        picture = job.on_device(DeviceCall(vae, decode_small, (vae, latents[:1])))
    except Exception as error:  # recorded, and the job goes on without
        log.warning("a preview failed; this job shows no more", exc_info=error)
        return False
    if picture is not None:
        job.preview(step, PNG, png_bytes(picture))
    return True


def decode_small(vae: Any, latents: torch.Tensor) -> Image.Image | None:
    """Decode one picture's latents (1, channels, height, width), pooled so that the picture has about 64 pixels a side.

    The cost is bounded whatever the model's size. None if a number is not finite.
    """
    config = vae.config
    scale = 2 ** (len(config.block_out_channels) - 1)
    factor = max(1, -(-max(latents.shape[-2:]) * scale // PREVIEW_SIDE_PX))
    latents = latents.to(vae.dtype)
    if factor > 1:
        height, width = (max(1, side // factor) for side in latents.shape[-2:])
        latents = torch.nn.functional.adaptive_avg_pool2d(latents, (height, width))
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    picture = vae.decode(latents, return_dict=False)[0][0]
    if not bool(torch.isfinite(picture).all()):
        return None
    pixels = (picture / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def _stats(latents: torch.Tensor) -> dict[str, Any] | None:
    """Shape, mean and spread of the last latents; None if they are not finite, since JSON has no NaN."""
    numbers = latents.float()
    mean, std = float(numbers.mean()), float(numbers.std(correction=0))
    if not (math.isfinite(mean) and math.isfinite(std)):
        return None
    return {"shape": list(latents.shape), "mean": round(mean, 6), "std": round(std, 6)}
