"""Reads a picture back: which background, which colour, which shape, which size.

It is not told what was asked for, so it can be wrong, and a wrong picture can fail.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from workers.training.shapes.pictures import PALETTE, SHAPES, SIZES, FloatArray, Placement, Subject, ideal_mask

SHIFTS = tuple(range(-4, 5))
"""Shifts tried along each axis, in pixels."""

LEAST_OVERLAP = 0.6
"""Overlap with the best ideal mask below which a picture shows no shape: a blob is not a poor circle."""

_FRAME = 2
_VISIBLE = 0.15
"""Least distance in RGB, each channel in [0, 1], at which something stands out from the background."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture seems to show.

    `background`: a name in `PALETTE`; `colour`: the same, or None if nothing stands out; `overlap`:
    intersection over union with the best ideal mask, 0 to 1; `shape`, `size`: of that mask, or None
    if the overlap is below `LEAST_OVERLAP`.
    """

    background: str
    colour: str | None
    shape: str | None
    size: str | None
    overlap: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a picture shows what was asked: both colours, the shape, the size."""

    colours: bool
    shape: bool
    size: bool


def read_picture(picture: FloatArray) -> Reading:
    """Read a picture, float [64, 64, 3] with RGB in [0, 1].

    The background is the median of the two outermost pixels all around; the shape is whatever is
    nearer to the colour that stands out than to the background, and takes the name of the ideal
    mask with the greatest overlap, over all shapes, sizes and `SHIFTS`.
    """
    frame = np.ones(picture.shape[:2], dtype=np.bool_)
    frame[_FRAME:-_FRAME, _FRAME:-_FRAME] = False
    below = np.median(picture[frame], axis=0)
    distance = np.linalg.norm(picture - below, axis=-1)
    farthest = float(np.quantile(distance, 0.98))
    if farthest < _VISIBLE:
        return Reading(_nearest_colour(below), None, None, None, 0.0)
    above = np.median(picture[distance > 0.5 * farthest], axis=0)
    mask = np.linalg.norm(picture - above, axis=-1) < distance
    names, ideals = _ideal_masks()
    common = ideals @ mask.ravel().astype(np.float32)
    overlaps = common / (ideals.sum(axis=1) + mask.sum() - common)
    best = int(np.argmax(overlaps))
    overlap = float(overlaps[best])
    shape, size = names[best] if overlap >= LEAST_OVERLAP else (None, None)
    return Reading(_nearest_colour(below), _nearest_colour(above), shape, size, overlap)


def judge(asked: Subject, seen: Reading) -> Verdict:
    """Compare what was asked with what is seen."""
    return Verdict(
        colours=seen.background == asked.background and seen.colour == asked.colour,
        shape=seen.shape == asked.shape,
        size=seen.size == asked.size,
    )


def _nearest_colour(rgb: NDArray[np.floating]) -> str:
    return min(PALETTE, key=lambda name: float(np.linalg.norm(rgb - np.asarray(PALETTE[name]) / 255.0)))


@lru_cache(maxsize=1)
def _ideal_masks() -> tuple[list[tuple[str, str]], FloatArray]:
    names: list[tuple[str, str]] = []
    rows: list[FloatArray] = []
    for shape, size, dx, dy in itertools.product(SHAPES, SIZES, SHIFTS, SHIFTS):
        names.append((shape, size))
        rows.append((ideal_mask(shape, size, Placement(dx, dy)) > 0.5).astype(np.float32).ravel())
    return names, np.stack(rows)
