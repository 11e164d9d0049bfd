"""Draws the pictures that `shapes` learns from, and the ideal masks it is judged by.

A picture is one `Subject` (shape, colour, background, size) at one `Placement`
(a small shift, a small change of scale). Sizes are in pixels of a 64x64 picture,
x to the right and y downwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

SIDE = 64
"""Width and height of every picture, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "blue": (30, 60, 220),
    "green": (30, 160, 60),
    "yellow": (255, 230, 40),
    "purple": (130, 40, 170),
    "orange": (245, 130, 20),
    "pink": (255, 130, 190),
    "cyan": (40, 210, 230),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
"""The ten colours, as 8-bit RGB."""

COLOURS = tuple(PALETTE)

RADII: dict[str, float] = {"small": 13.0, "": 19.0, "large": 26.0}
"""Radius in pixels by size word; the empty word is the size that no caption names."""

SIZES = tuple(RADII)

MAX_SHIFT = 3.0
"""How far a shape's centre may lie from the picture's, in pixels along each axis."""

MAX_STRETCH = 0.04
"""How much a shape's radius may differ from its size's, as a share of it."""

_SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """What a picture shows.

    `colour` and `background` are names in `PALETTE` and differ; `shape` is one of
    `SHAPES`; `size` is one of `SIZES`.
    """

    shape: str
    colour: str
    background: str
    size: str

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r} is unknown; choose one of {SHAPES}")
        for colour in (self.colour, self.background):
            if colour not in PALETTE:
                raise ValueError(f"colour {colour!r} is unknown; choose one of {COLOURS}")
        if self.size not in RADII:
            raise ValueError(f"size {self.size!r} is unknown; choose one of {SIZES}")
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} shape on {self.background} cannot be seen; choose two colours")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a shape lies: shift in pixels from the middle, and scale as a factor (default: exact)."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


def all_subjects() -> tuple[Subject, ...]:
    """List every subject once, in a fixed order: 8 shapes, 90 colour pairs, 3 sizes, 2,160 in all."""
    return tuple(
        Subject(shape, colour, background, size)
        for shape, colour, background, size in itertools.product(SHAPES, COLOURS, COLOURS, SIZES)
        if colour != background
    )


def random_placement(rng: np.random.Generator) -> Placement:
    """Draw a placement, uniform within `MAX_SHIFT` and `MAX_STRETCH`."""
    dx, dy = rng.uniform(-MAX_SHIFT, MAX_SHIFT, size=2)
    return Placement(float(dx), float(dy), float(1.0 + rng.uniform(-MAX_STRETCH, MAX_STRETCH)))


def ideal_mask(shape: str, size: str, placement: Placement = Placement()) -> FloatArray:
    """Draw how much of each pixel a shape covers.

    Returns float32 [64, 64] in [0, 1], antialiased. `shape` and `size` as in `Subject`; the
    placement defaults to the exact middle. Raises KeyError for an unknown shape or size.
    """
    radius = RADII[size] * placement.scale
    samples = SIDE * _SUPERSAMPLING
    axis: FloatArray = ((np.arange(samples, dtype=np.float32) + 0.5) / _SUPERSAMPLING - SIDE / 2).astype(np.float32)
    x: FloatArray = (axis[None, :] - np.float32(placement.dx)) / np.float32(radius)
    y: FloatArray = (axis[:, None] - np.float32(placement.dy)) / np.float32(radius)
    inside = _INSIDE[shape](x, y)
    blocks = inside.reshape(SIDE, _SUPERSAMPLING, SIDE, _SUPERSAMPLING)
    covered: FloatArray = blocks.mean(axis=(1, 3), dtype=np.float32)
    return covered


def paint(mask: FloatArray, colour: str, background: str) -> FloatArray:
    """Lay a colour over a background through a mask.

    `mask` is float [..., 64, 64] in [0, 1]; returns float32 [..., 64, 64, 3], RGB in [0, 1].
    Raises KeyError for a colour that is not in `PALETTE`.
    """
    below, above = (np.asarray(PALETTE[name], dtype=np.float32) / 255.0 for name in (background, colour))
    return below + mask[..., None] * (above - below)


def draw(subject: Subject, placement: Placement = Placement()) -> FloatArray:
    """Draw a subject as float32 [64, 64, 3], RGB in [0, 1]; the placement defaults to the middle."""
    return paint(ideal_mask(subject.shape, subject.size, placement), subject.colour, subject.background)


@lru_cache(maxsize=1)
def mask_bank(seed: int, placements: int) -> FloatArray:
    """Draw the masks that training pictures are painted through.

    Returns float32 [8 shapes, 3 sizes, placements, 64, 64] in the order of `SHAPES` and `SIZES`.
    The same seed gives the same masks; the array is shared, so treat it as read-only.
    """
    rng = np.random.default_rng([seed, 1])
    bank = np.empty((len(SHAPES), len(SIZES), placements, SIDE, SIDE), dtype=np.float32)
    for (i, shape), (j, size), k in itertools.product(enumerate(SHAPES), enumerate(SIZES), range(placements)):
        bank[i, j, k] = ideal_mask(shape, size, random_placement(rng))
    bank.setflags(write=False)
    return bank


Inside = NDArray[np.bool_]


def _circle(x: FloatArray, y: FloatArray) -> Inside:
    return x * x + y * y <= 1.0


def _square(x: FloatArray, y: FloatArray) -> Inside:
    inside: Inside = np.maximum(np.abs(x), np.abs(y)) <= 0.85
    return inside


def _triangle(x: FloatArray, y: FloatArray) -> Inside:
    # Equilateral, circumradius 1.1, lowered by 0.2 so that it looks centred.
    y = y - np.float32(0.2)
    inside: Inside = (y <= 0.55) & (np.sqrt(3.0) * np.abs(x) - y <= 1.1)
    return inside


def _star(x: FloatArray, y: FloatArray) -> Inside:
    # Ten equal sectors, each bounded by the line from an outer corner to an inner one.
    inner = 0.45
    radius = np.hypot(x, y)
    sector = np.pi / 5
    angle = np.arctan2(x, -y) % (2 * sector)
    angle = np.minimum(angle, 2 * sector - angle)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    corner_u, corner_v = inner * np.cos(sector), inner * np.sin(sector)
    inside: Inside = (u - 1.0) * corner_v - v * (corner_u - 1.0) <= 0.0
    return inside


def _heart(x: FloatArray, y: FloatArray) -> Inside:
    x, y = x * np.float32(1.2), np.float32(0.1) - y * np.float32(1.2)
    inside: Inside = (x * x + y * y - 1.0) ** 3 - x * x * y**3 <= 0.0
    return inside


def _cross(x: FloatArray, y: FloatArray) -> Inside:
    longer, shorter = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    inside: Inside = (longer <= 0.95) & (shorter <= 0.32)
    return inside


def _diamond(x: FloatArray, y: FloatArray) -> Inside:
    inside: Inside = np.abs(x) / 0.75 + np.abs(y) <= 1.05
    return inside


def _ring(x: FloatArray, y: FloatArray) -> Inside:
    squared = x * x + y * y
    return (squared <= 1.0) & (squared >= 0.55**2)


_INSIDE: dict[str, Callable[[FloatArray, FloatArray], Inside]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
}
