"""Measures the model: prompts it was never trained on, drawn and read back, against the bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from workers.training.shapes.captions import plain_caption, split_subjects, varied_caption
from workers.training.shapes.pictures import SIDE, FloatArray, Subject
from workers.training.shapes.reading import Reading, judge, read_picture

COLOURS_BAR, SHAPES_BAR = 0.95, 0.80
SECONDS_BAR_PER_STEP = 1.0 / 20
"""A picture of 20 steps has one second; of 40, two."""

_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")

Pipeline = Literal["classic", "modular"]
Wording = Literal["plain", "varied", "upper"]
Drawer = Callable[[Sequence[str], Sequence[int]], FloatArray]
"""Draws one picture per prompt and seed: float32 [prompts, 64, 64, 3], RGB in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How the model is asked: the defaults are the preset 'balanced' with the documented wording.

    `count` prompts at most, from the subjects that training with `seed` held out; `steps`;
    `guidance`; `batch` pictures at a time; `threads` of torch, one by default, since several
    collapse on a machine that does other work.
    """

    seed: int = 7
    count: int = 200
    steps: int = 20
    guidance: float = 7.5
    pipeline: Pipeline = "classic"
    wording: Wording = "plain"
    batch: int = 8
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Miss:
    """A picture that shows something else than was asked."""

    prompt: str
    seed: int
    seen: Reading


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one trial; shares are 0 to 1, `seconds_per_picture`: one drawn alone, best of five."""

    trial: Trial
    prompts: int
    colours_right: float
    shape_right: float
    size_right: float
    mean_overlap: float
    seconds_per_picture: float
    misses: tuple[Miss, ...]

    @property
    def seconds_bar(self) -> float:
        """How long one picture may take, in seconds."""
        return SECONDS_BAR_PER_STEP * self.trial.steps

    @property
    def passes(self) -> bool:
        """Whether colours, shapes and time all reach the bar."""
        return (
            self.colours_right >= COLOURS_BAR
            and self.shape_right >= SHAPES_BAR
            and self.seconds_per_picture < self.seconds_bar
        )

    def as_json(self) -> dict[str, Any]:
        """Give the figures as JSON-ready data, with `passes`."""
        return {**asdict(self), "passes": self.passes}

    def as_text(self) -> str:
        """Give the figures as lines for a reader."""
        trial = self.trial
        lines = [
            f"{self.prompts} held-out prompts ({trial.wording}), {trial.pipeline} pipeline, {trial.steps} steps,",
            f"guidance {trial.guidance:g}, split and pictures from seed {trial.seed}",
            f"both colours right  {self.colours_right:7.1%}   bar {COLOURS_BAR:.0%}",
            f"shape recognised    {self.shape_right:7.1%}   bar {SHAPES_BAR:.0%}",
            f"size recognised     {self.size_right:7.1%}",
            f"mean overlap        {self.mean_overlap:7.3f}",
            f"seconds per picture {self.seconds_per_picture:7.3f}   bar {self.seconds_bar:g} ({trial.threads} threads)",
            "passes" if self.passes else "FAILS",
        ]
        lines += [
            f"  miss: {miss.prompt!r} seed {miss.seed}: seen {miss.seen.size or 'medium'} {miss.seen.colour} "
            f"{miss.seen.shape} on {miss.seen.background}, overlap {miss.seen.overlap:.2f}"
            for miss in self.misses
        ]
        return "\n".join(lines)


def evaluate(folder: Path, trial: Trial) -> Report:
    """Load the model in `folder` in fp32 on the CPU and measure it. Sets torch's thread count."""
    torch.set_num_threads(trial.threads)
    draw = load_drawer(folder, trial)
    _, held_out = split_subjects(trial.seed)
    rng = np.random.default_rng([trial.seed, 3])
    asked = [held_out[int(i)] for i in rng.permutation(len(held_out))[: trial.count]]
    return score(asked, [_word(subject, trial.wording, rng) for subject in asked], draw, trial)


def score(asked: Sequence[Subject], prompts: Sequence[str], draw: Drawer, trial: Trial) -> Report:
    """Draw every prompt, read the pictures back, and count.

    Picture i is drawn with seed `trial.seed` + i. Raises ValueError if there is nothing to draw.
    """
    if not asked or len(asked) != len(prompts):
        raise ValueError(f"{len(asked)} subjects and {len(prompts)} prompts; give one prompt per subject, at least one")
    seen: list[Reading] = []
    for start in range(0, len(prompts), trial.batch):
        chunk = prompts[start : start + trial.batch]
        seeds = range(trial.seed + start, trial.seed + start + len(chunk))
        seen += [read_picture(picture) for picture in draw(chunk, seeds)]
    verdicts = [judge(subject, reading) for subject, reading in zip(asked, seen, strict=True)]
    misses = tuple(
        Miss(prompts[i], trial.seed + i, seen[i])
        for i, verdict in enumerate(verdicts)
        if not (verdict.colours and verdict.shape)
    )
    return Report(
        trial=trial,
        prompts=len(asked),
        colours_right=float(np.mean([verdict.colours for verdict in verdicts])),
        shape_right=float(np.mean([verdict.shape for verdict in verdicts])),
        size_right=float(np.mean([verdict.size for verdict in verdicts])),
        mean_overlap=float(np.mean([reading.overlap for reading in seen])),
        seconds_per_picture=_seconds_per_picture(draw, prompts[0], trial.seed),
        misses=misses,
    )


def load_drawer(folder: Path, trial: Trial) -> Drawer:
    """Load the model as the pipeline that `trial` names and return a function that draws with it."""
    return _classic(folder, trial) if trial.pipeline == "classic" else _modular(folder, trial)


def _classic(folder: Path, trial: Trial) -> Drawer:
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> FloatArray:
        pictures: FloatArray = pipeline(
            list(prompts),
            num_inference_steps=trial.steps,
            guidance_scale=trial.guidance,
            width=SIDE,
            height=SIDE,
            generator=_generators(seeds),
            output_type="np",
        ).images
        return pictures

    return draw


def _modular(folder: Path, trial: Trial) -> Drawer:
    from diffusers import ClassifierFreeGuidance, ModularPipeline

    pipeline: Any = ModularPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.load_components(names=list(_PARTS), dtype=torch.float32, local_files_only=True)
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=trial.guidance))
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> FloatArray:
        pictures: FloatArray = pipeline(
            prompt=list(prompts),
            num_inference_steps=trial.steps,
            width=SIDE,
            height=SIDE,
            generator=_generators(seeds),
            output_type="np",
            output="images",
        )
        return pictures

    return draw


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _word(subject: Subject, wording: Wording, rng: np.random.Generator) -> str:
    if wording == "plain":
        return plain_caption(subject)
    if wording == "upper":
        return plain_caption(subject).upper()
    while True:
        caption, stated = varied_caption(subject, rng)
        if stated.colour and stated.background:
            return caption


def _seconds_per_picture(draw: Drawer, prompt: str, seed: int) -> float:
    times: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        draw([prompt], [seed])
        times.append(time.perf_counter() - begun)
    return min(times)  # the best of five: the one that other work on the machine disturbed least
