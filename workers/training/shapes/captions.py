"""Words for pictures: captions, and which subjects are kept out of training.

A caption may leave things out; what it does say comes back as `Stated`, so that a
text encoder can be taught to read exactly that and nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.training.shapes.pictures import SHAPES, Subject, all_subjects

HELD_OUT = 200
"""How many of the 2,160 subjects no training stage ever sees."""

_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}

_OPENINGS = ("", "", "", "draw ", "a picture of ", "an image of ", "a drawing of ", "please draw ", "show me ")

_NOISE_WORDS = (
    "nice",
    "bright",
    "beautiful",
    "simple",
    "flat",
    "clean",
    "in the middle",
    "4k",
    "photo",
    "high quality",
)


@dataclass(frozen=True, slots=True)
class Stated:
    """What a caption says about a picture; None where it says nothing.

    `size` is always known: a caption without a size word means the size in between.
    """

    shape: str | None
    colour: str | None
    background: str | None
    size: str


def split_subjects(seed: int) -> tuple[tuple[Subject, ...], tuple[Subject, ...]]:
    """Divide all subjects into (training, held out), by seed; `HELD_OUT` of them are held out.

    Every shape, colour, background and size stays present in training: only combinations are new.
    """
    subjects = all_subjects()
    order = np.random.default_rng([seed, 0]).permutation(len(subjects))
    held_out = sorted(int(i) for i in order[:HELD_OUT])
    kept = sorted(int(i) for i in order[HELD_OUT:])
    return tuple(subjects[i] for i in kept), tuple(subjects[i] for i in held_out)


def plain_caption(subject: Subject) -> str:
    """Say everything about a subject the way users are told to: 'a large red circle on a blue background'."""
    phrase = _noun_phrase(subject.size, subject.colour, subject.shape)
    return f"{phrase} on {_article(subject.background)} {subject.background} background"


def varied_caption(subject: Subject, rng: np.random.Generator) -> tuple[str, Stated]:
    """Say a subject in one of many ways, sometimes leaving its colour or background out.

    Returns the caption and what it states. The same generator state gives the same caption.
    """
    leave_out = rng.random()
    colour = None if leave_out < 0.03 else subject.colour
    background = None if 0.03 <= leave_out < 0.10 else subject.background
    size = subject.size
    word = size if not size or rng.random() < 0.7 else str(rng.choice(_SIZE_WORDS[size]))
    phrase = _noun_phrase(word, colour or "", subject.shape)
    if rng.random() < 0.15:
        phrase = phrase.split(" ", 1)[1]
    caption = phrase if background is None else _place(phrase, background, rng)
    if rng.random() < 0.25:
        caption = str(rng.choice(_OPENINGS)) + caption
    if rng.random() < 0.10:
        caption = f"{caption}, {_noise(rng)}"
    if rng.random() < 0.05:
        caption = f"{_noise(rng)} {caption}"
    return caption, Stated(subject.shape, colour, background, size)


def example_captions(seed: int, count: int) -> list[str]:
    """Write `count` varied captions of training subjects, for building the tokenizers' vocabulary."""
    rng = np.random.default_rng([seed, 2])
    subjects, _ = split_subjects(seed)
    return [varied_caption(subjects[int(rng.integers(len(subjects)))], rng)[0] for _ in range(count)]


def _noun_phrase(size_word: str, colour: str, shape: str) -> str:
    words = " ".join(word for word in (size_word, colour, shape) if word)
    return f"{_article(words)} {words}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _place(phrase: str, background: str, rng: np.random.Generator) -> str:
    article = _article(background)
    forms = (
        f"{phrase} on a {background} background",
        f"{phrase} on {article} {background} background",
        f"{phrase} on {background}",
        f"{phrase} on {background} background",
        f"{phrase}, {background} background",
        f"{phrase} with {article} {background} background",
        f"{phrase} in front of {article} {background} background",
        f"on {article} {background} background, {phrase}",
        f"{article} {background} background with {phrase}",
    )
    weights = np.array([6, 3, 2, 2, 1, 1, 1, 1, 1], dtype=np.float64)
    return forms[int(rng.choice(len(forms), p=weights / weights.sum()))]


def _noise(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return str(rng.choice(_NOISE_WORDS))
    letters = rng.integers(ord("a"), ord("z") + 1, size=int(rng.integers(2, 8)))
    word = "".join(chr(int(letter)) for letter in letters)
    return word if word not in SHAPES else "thing"
