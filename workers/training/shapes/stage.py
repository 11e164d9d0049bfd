"""What the training stages share: seeds per step, the learning rate's course, EMA, checkpoints, progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def numpy_source(seed: int, stage: int, step: int) -> np.random.Generator:
    """Give the NumPy generator of one step, so that a resumed run draws what an unbroken one draws."""
    return np.random.default_rng([seed, stage, step])


def torch_source(seed: int, stage: int, step: int) -> torch.Generator:
    """Give the torch generator of one step, on the CPU; same promise as `numpy_source`."""
    state = np.random.SeedSequence([seed, stage, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def learning_rate(step: int, steps: int, peak: float, *, warmup: int, decay_share: float) -> float:
    """Say the learning rate of a step: a linear rise, a plateau, then a cosine fall to a fiftieth.

    `step` counts from 0 to `steps` - 1; `warmup` is in steps; `decay_share` is the share of all
    steps that the fall takes. Until the fall begins the rate does not depend on `steps`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    fall = max(1.0, steps * decay_share)
    done = min(1.0, max(0.0, (step - (steps - fall)) / fall))
    return peak * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group of an optimizer the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class MovingAverage:
    """An exponential moving average of a module's parameters, with a warm start.

    After step n the decay is min(`decay`, (1 + n) / (10 + n)). Not thread-safe.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average one step towards the module's present parameters."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        names = [name for name, _ in module.named_parameters()]
        now = [parameter.detach() for _, parameter in module.named_parameters()]
        torch._foreach_lerp_([self.shadow[name] for name in names], now, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that a reader sees the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint of this package, or None if there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class ProgressLines:
    """Prints one line every `every` steps: stage, step, mean loss since the last line, pace, time left."""

    def __init__(self, stage: str, steps: int, *, first: int = 0, every: int = 50) -> None:
        self.stage, self.steps, self.first, self.every = stage, steps, first, every
        self.begun = time.monotonic()
        self._losses: list[float] = []

    def step(self, step: int, loss: float) -> None:
        """Count step `step` (from 0) with its loss; print when a line is due."""
        self._losses.append(loss)
        if (step + 1) % self.every and step + 1 != self.steps:
            return
        pace = (time.monotonic() - self.begun) / (step + 1 - self.first)
        print(
            f"{self.stage} {step + 1}/{self.steps} loss {np.mean(self._losses):.5f} "
            f"{pace:.3f} s/step, {pace * (self.steps - step - 1) / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )
        self._losses.clear()
