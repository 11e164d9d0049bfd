"""The pictures `shapes` learns from, and the evaluator it is judged by, which has to be able to fail."""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

pytest.importorskip("torch")  # the training package is the worker's, and may use it at import

from workers.training.shapes.captions import HELD_OUT, Stated, plain_caption, split_subjects, varied_caption
from workers.training.shapes.evaluate import Drawer, Trial, score
from workers.training.shapes.pictures import (
    COLOURS,
    PALETTE,
    SHAPES,
    SIDE,
    SIZES,
    Placement,
    Subject,
    all_subjects,
    draw,
    ideal_mask,
    paint,
    random_placement,
)
from workers.training.shapes.reading import LEAST_OVERLAP, Verdict, judge, read_picture

RED_CIRCLE = Subject("circle", "red", "blue", "large")


# Pictures


@pytest.mark.parametrize(("shape", "size"), list(itertools.product(SHAPES, SIZES)))
def test_a_mask_lies_inside_the_picture_wherever_it_is_placed(shape: str, size: str) -> None:
    for dx, dy in itertools.product((-3.0, 3.0), repeat=2):
        mask = ideal_mask(shape, size, Placement(dx, dy, 1.04))

        assert mask.shape == (SIDE, SIDE)
        assert mask.dtype == np.float32
        assert mask.min() == 0.0
        assert mask.max() == 1.0
        assert np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).max() < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_an_edge_between_two_pixels_is_antialiased(shape: str) -> None:
    mask = ideal_mask(shape, "", Placement(0.4, 0.4))

    assert np.any((mask > 0.0) & (mask < 1.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_larger_size_covers_more(shape: str) -> None:
    areas = [float(ideal_mask(shape, size).sum()) for size in ("small", "", "large")]

    assert areas[0] * 1.5 < areas[1]
    assert areas[1] * 1.5 < areas[2]


@pytest.mark.parametrize("size", SIZES)
def test_no_two_shapes_look_alike(size: str) -> None:
    masks = {shape: ideal_mask(shape, size) > 0.5 for shape in SHAPES}

    for one, other in itertools.combinations(SHAPES, 2):
        overlap = np.sum(masks[one] & masks[other]) / np.sum(masks[one] | masks[other])
        assert overlap < 0.85, (one, other)


def test_a_shift_moves_the_shape_right_and_down() -> None:
    rows, columns = np.nonzero(ideal_mask("square", "small", Placement(3.0, 2.0)) > 0.5)

    assert columns.mean() == pytest.approx(SIDE / 2 - 0.5 + 3.0, abs=0.3)
    assert rows.mean() == pytest.approx(SIDE / 2 - 0.5 + 2.0, abs=0.3)


def test_a_picture_shows_the_colour_in_the_middle_and_the_background_in_the_corner() -> None:
    picture = draw(RED_CIRCLE)

    assert picture.shape == (SIDE, SIDE, 3)
    assert picture[SIDE // 2, SIDE // 2] * 255 == pytest.approx(PALETTE["red"])
    assert picture[0, 0] * 255 == pytest.approx(PALETTE["blue"])


@pytest.mark.parametrize(
    ("subject", "named"),
    [
        (("blob", "red", "blue", ""), "blob"),
        (("circle", "beige", "blue", ""), "beige"),
        (("circle", "red", "beige", ""), "beige"),
        (("circle", "red", "blue", "huge"), "huge"),
        (("circle", "red", "red", ""), "red"),
    ],
)
def test_a_subject_that_cannot_be_drawn_is_refused_by_name(subject: tuple[str, str, str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Subject(*subject)


# Captions


def test_the_plain_caption_is_the_documented_one() -> None:
    assert plain_caption(RED_CIRCLE) == "a large red circle on a blue background"
    assert plain_caption(Subject("star", "black", "orange", "")) == "a black star on an orange background"


def test_the_split_is_decided_by_the_seed_and_holds_out_only_combinations() -> None:
    kept, held_out = split_subjects(7)

    assert (kept, held_out) == split_subjects(7)
    assert held_out != split_subjects(8)[1]
    assert len(held_out) == len(set(held_out)) == HELD_OUT
    assert set(kept) | set(held_out) == set(all_subjects())
    assert not set(kept) & set(held_out)
    assert {subject.shape for subject in kept} == set(SHAPES)
    assert {subject.colour for subject in kept} == {subject.background for subject in kept} == set(COLOURS)


def test_a_caption_states_exactly_what_it_says() -> None:
    rng = np.random.default_rng(0)
    silent = 0
    for _ in range(500):
        caption, stated = varied_caption(RED_CIRCLE, rng)

        assert stated.shape == "circle"
        assert stated.size == "large"
        assert ("red" in caption) == (stated.colour == "red")
        assert ("blue" in caption) == (stated.background == "blue")
        silent += stated != Stated("circle", "red", "blue", "large")
    assert 0 < silent < 100


def test_the_same_generator_state_gives_the_same_captions() -> None:
    first, second = (
        [varied_caption(RED_CIRCLE, rng) for _ in range(20)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )

    assert first == second


# The evaluator


def test_every_ideal_picture_is_read_as_what_it_is() -> None:
    rng = np.random.default_rng(1)
    for subject in all_subjects()[::9]:
        reading = read_picture(draw(subject, random_placement(rng)))

        assert judge(subject, reading) == Verdict(colours=True, shape=True, size=True), (subject, reading)
        assert reading.overlap > 0.8


@pytest.mark.parametrize(
    ("drawn", "verdict"),
    [
        (Subject("circle", "pink", "blue", "large"), Verdict(colours=False, shape=True, size=True)),
        (Subject("circle", "red", "cyan", "large"), Verdict(colours=False, shape=True, size=True)),
        (Subject("circle", "blue", "red", "large"), Verdict(colours=False, shape=True, size=True)),
        (Subject("heart", "red", "blue", "large"), Verdict(colours=True, shape=False, size=True)),
        (Subject("square", "red", "blue", "large"), Verdict(colours=True, shape=False, size=True)),
        (Subject("circle", "red", "blue", "small"), Verdict(colours=True, shape=True, size=False)),
    ],
)
def test_a_wrong_colour_shape_or_size_is_noticed(drawn: Subject, verdict: Verdict) -> None:
    assert judge(RED_CIRCLE, read_picture(draw(drawn))) == verdict


def test_a_blob_that_overlaps_no_ideal_mask_well_is_no_shape() -> None:
    stripes = np.zeros((SIDE, SIDE), dtype=np.float32)
    stripes[::4, 4:-4] = stripes[1::4, 4:-4] = 1.0

    reading = read_picture(paint(stripes, "red", "blue"))

    assert (reading.colour, reading.shape) == ("red", None)
    assert reading.overlap < LEAST_OVERLAP


def test_an_empty_picture_shows_no_shape() -> None:
    picture = draw(RED_CIRCLE)
    picture[:] = picture[0, 0]

    reading = read_picture(picture)

    assert reading.background == "blue"
    assert (reading.colour, reading.shape, reading.size) == (None, None, None)
    assert judge(RED_CIRCLE, reading) == Verdict(colours=False, shape=False, size=False)


def test_noise_is_no_shape_at_all() -> None:
    rng = np.random.default_rng(2)
    asked = list(split_subjects(7)[1][::8])

    report = score(
        asked,
        [plain_caption(subject) for subject in asked],
        lambda prompts, _: rng.random((len(prompts), SIDE, SIDE, 3), dtype=np.float32),
        Trial(),
    )

    assert not report.passes
    assert report.colours_right < 0.2
    assert report.shape_right == 0.0


def test_ideal_pictures_score_full_marks_and_mixed_up_ones_fail() -> None:
    asked = list(split_subjects(7)[1][:16])
    by_prompt = {plain_caption(subject): subject for subject in asked}
    mixed_up = dict(zip(by_prompt, [*asked[1:], asked[0]], strict=True))

    good = score(asked, list(by_prompt), _drawer(by_prompt), Trial())
    bad = score(asked, list(mixed_up), _drawer(mixed_up), Trial())

    assert (good.colours_right, good.shape_right, good.size_right) == (1.0, 1.0, 1.0)
    assert good.passes
    assert not good.misses
    assert bad.colours_right < 0.5
    assert not bad.passes
    assert bad.misses[0].prompt in bad.as_text()


def test_a_score_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        score([], [], _drawer({}), Trial())


def _drawer(subjects: Mapping[str, Subject]) -> Drawer:
    return lambda prompts, _: np.stack([draw(subjects[prompt]) for prompt in prompts])
