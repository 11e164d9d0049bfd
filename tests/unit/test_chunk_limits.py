"""How many rows a device call may have: found by measuring devices of known make, and kept in a file."""

import json
import logging
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.chunks.curve import CALLS_MIN, CALLS_SURE, GAIN_MIN, TOO_LARGE_FOR_S, TRIAL_EVERY, Curve
from workers.chunks.limits import KEYS_MAX, SAVE_EVERY_S, TOLD_MAX, MeasuredLimits, MeasureKey

SMALL, LARGE = MeasureKey("model", "unet", "64x64 fp32"), MeasureKey("model", "unet", "512x512 fp32")
# Seconds of a call by its rows.
Device = Callable[[int], float]


class Clock:
    """A clock that the test moves."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def filling(rows: int) -> float:
    """Half idle at ten rows."""
    return 0.1 + 0.01 * rows


def linear(rows: int) -> float:
    """Full with one row: to share brings nothing."""
    return 0.01 * rows


def stepped(rows: int) -> float:
    """Works in blocks of four rows, as kernels with tiles do."""
    return 0.01 + 0.01 * math.ceil(rows / 4)


def drive(curve: Curve, device: Device, calls: int, *, waiting: int = 64, member_rows: int = 1) -> list[int]:
    """Make calls as the line does, with so many members always waiting; what the rows of each were."""
    made = []
    for _ in range(calls):
        members = max(min(curve.rows_max() // member_rows, waiting), 1)
        made.append(members * member_rows)
        curve.note(made[-1], device(made[-1]))
    return made


def settled(device: Device, **demand: int) -> int:
    """What pays on the device, after many calls."""
    curve = Curve()
    drive(curve, device, 4000, **demand)
    best = curve.best()
    assert best is not None
    return best.rows


# What pays


@pytest.mark.parametrize(
    ("device", "member_rows", "pays"),
    [
        (linear, 1, 1),
        (linear, 2, 2),  # that is a single member with guidance: off
        (filling, 1, 10),  # 11 would bring 4.8 %
        (filling, 2, 16),  # 18, for the ninth member, would bring 4.5 %
        (stepped, 1, 8),  # from 4 to 8 they bring 33 %, from 8 to 12 12 %: 7 % and 3 % a row
        (lambda rows: max(0.06, 0.01 * rows), 1, 6),  # full with six
        (lambda rows: 0.01, 1, 20),  # a row that costs nothing brings 5 % more up to the 21st
    ],
)
def test_the_limit_is_where_another_member_brings_five_per_cent_no_more(
    device: Device, member_rows: int, pays: int
) -> None:
    assert abs(settled(device, member_rows=member_rows) - pays) <= 1


@settings(max_examples=30)
@given(
    start_s=st.floats(0.0, 1.0),
    row_s=st.floats(0.001, 1.0),
    full_at=st.integers(1, 40),
    member_rows=st.sampled_from((1, 2)),
)
def test_what_pays_comes_close_to_the_best_of_any_device_that_fills_up(
    start_s: float, row_s: float, full_at: int, member_rows: int
) -> None:
    def device(rows: int) -> float:
        return start_s + row_s * max(rows, full_at) / full_at

    def worth(rows: int) -> float:
        return float(rows / device(rows) / GAIN_MIN ** (rows / member_rows))

    best = max(map(worth, range(member_rows, 65, member_rows)))
    assert worth(settled(device, member_rows=member_rows)) > 0.9 * best


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_odd_slow_calls_do_not_turn_sharing_off_where_it_pays(seed: int) -> None:
    rng = random.Random(seed)

    def noisy(rows: int) -> float:
        return filling(rows) * rng.lognormvariate(0, 0.1) * (10 if rng.random() < 0.05 else 1)

    assert 5 <= settled(noisy, waiting=16) <= 16


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_make_long_chunks_where_they_bring_nothing(seed: int) -> None:
    rng = random.Random(seed)
    assert settled(lambda rows: linear(rows) * rng.lognormvariate(0, 0.05), waiting=16) <= 2


def test_a_busy_moment_while_a_size_is_new_does_not_turn_it_off() -> None:
    curve = Curve()
    drive(curve, filling, CALLS_MIN)
    drive(curve, lambda rows: 10 * filling(rows), CALLS_MIN)
    assert curve.rows_max() == 2
    drive(curve, filling, CALLS_SURE)
    assert curve.rows_max() > 2


# Care


def test_it_starts_with_single_rows_and_never_more_than_doubles_what_it_has_measured() -> None:
    curve = Curve()
    made = drive(curve, lambda rows: 0.01, 100)
    assert made[:CALLS_MIN] == [1] * CALLS_MIN
    for before, rows in enumerate(made[CALLS_MIN:], CALLS_MIN):
        seen = [size for size in set(made[:before]) if made[:before].count(size) >= CALLS_MIN]
        assert rows <= 2 * max(seen)


def test_what_did_not_come_is_not_taken_for_measured() -> None:
    curve = Curve()
    drive(curve, lambda rows: 0.01, 100, waiting=3)
    assert curve.rows_max() == 6


def test_where_sharing_does_not_pay_it_is_tried_again_only_now_and_then() -> None:
    curve = Curve()
    drive(curve, linear, 100)
    made = drive(curve, linear, 10 * TRIAL_EVERY)
    assert set(made) == {1, 2}
    assert 8 <= made.count(2) <= 10


def test_a_device_that_came_to_gain_from_sharing_is_found_out() -> None:
    curve = Curve()
    drive(curve, linear, 100)
    made = drive(curve, filling, 30 * TRIAL_EVERY)
    assert made[-1] > 4


def test_a_device_that_no_longer_gains_from_sharing_is_found_out() -> None:
    curve = Curve()
    drive(curve, filling, 100)
    made = drive(curve, lambda rows: 0.1 * rows, 30 * TRIAL_EVERY)
    assert sum(made[-TRIAL_EVERY:]) <= 1.1 * TRIAL_EVERY


def test_a_size_that_was_too_large_is_halved_and_stays_so_for_long() -> None:
    clock = Clock()
    curve = Curve(clock)
    drive(curve, lambda rows: 0.01, 100)
    curve.note_too_large(16)
    assert curve.rows_max() == 8
    curve.note_too_large(8)
    assert curve.rows_max() == 4
    clock.now_s += TOO_LARGE_FOR_S - 1
    assert max(drive(curve, lambda rows: 0.01, 2 * TRIAL_EVERY)) == 4
    curve.note_too_large(1)
    assert curve.rows_max() == 1


def test_a_size_that_was_too_large_is_approached_again_and_given_back_once_it_fits() -> None:
    clock = Clock()
    curve = Curve(clock)
    drive(curve, lambda rows: 0.01, 100)
    curve.note_too_large(16)
    for approached in (12, 14, 15):
        clock.now_s += TOO_LARGE_FOR_S
        assert max(drive(curve, lambda rows: 0.01, 100)) == approached
        assert curve.rows_max() == approached  # and no further before its time
    clock.now_s += TOO_LARGE_FOR_S
    drive(curve, lambda rows: 0.01, 100)
    assert curve.too_large is None
    assert curve.rows_max() > 16


def test_what_is_approached_in_vain_does_not_take_what_fitted() -> None:
    clock = Clock()
    curve = Curve(clock)
    drive(curve, lambda rows: 0.01, 100)
    curve.note_too_large(16)
    clock.now_s += TOO_LARGE_FOR_S
    assert curve.rows_max() == 12
    curve.note_too_large(12)
    assert curve.rows_max() == 8
    clock.now_s += TOO_LARGE_FOR_S
    assert curve.rows_max() == 10


# What is expected


def test_a_call_is_expected_to_take_what_was_measured_or_what_lies_between() -> None:
    curve = Curve()
    assert curve.expected_s(1) is None
    curve.note(2, 0.2)
    curve.note(4, 0.3)
    assert [curve.expected_s(rows) for rows in (1, 2, 3, 4, 8)] == pytest.approx([0.2, 0.2, 0.25, 0.3, 0.6])


def test_a_clock_that_stands_still_divides_nothing_by_zero() -> None:
    curve = Curve()
    drive(curve, lambda rows: 0.0, 50)
    assert curve.rows_max() >= 1


# By key, and told


def test_each_kind_of_call_has_a_limit_of_its_own() -> None:
    limits = MeasuredLimits()
    for _ in range(CALLS_MIN):
        limits.note(SMALL, 1, 0.01)
    assert limits.rows_max(SMALL) == 2
    assert limits.rows_max(LARGE) == 1
    assert limits.expected_s(SMALL, 1) == 0.01
    assert limits.expected_s(LARGE, 1) is None


def test_the_capability_record_tells_limit_gain_and_times() -> None:
    limits = MeasuredLimits()
    for rows, elapsed_s in ((1, 0.010), (2, 0.012), (1, 0.010), (2, 0.012), (1, 0.010), (2, 0.012), (4, 1.0)):
        limits.note(SMALL, rows, elapsed_s)
    (told,) = limits.chunks("model")
    assert (told.module, told.shape, told.limit) == ("unet", "64x64 fp32", 2)
    assert told.gain == pytest.approx(2 * 10 / 12, abs=0.001)
    assert told.fill == pytest.approx((3 * 1 + 3 * 2 + 4) / 7 / 2, abs=0.001)
    assert told.step_ms == {"1": 10.0, "2": 12.0}  # one call of 4 does not count yet
    assert limits.chunks("another") == ()


def test_what_is_remembered_and_what_is_told_have_ends() -> None:
    limits = MeasuredLimits()
    for number in range(KEYS_MAX + 10):
        for _ in range(CALLS_MIN):
            limits.note(MeasureKey("model", "unet", str(number)), 1, 0.01)
    assert len(limits.keys()) == KEYS_MAX
    assert limits.rows_max(MeasureKey("model", "unet", "0")) == 1
    told = limits.chunks("model")
    assert len(told) == TOLD_MAX
    assert told[0].shape == str(KEYS_MAX + 9)


def test_it_is_read_while_the_device_writes() -> None:
    limits = MeasuredLimits()
    done = threading.Event()

    def note() -> None:
        for number in range(3000):
            limits.note(MeasureKey("model", "unet", str(number // 9)), 1 + number % 3, 0.01)
        done.set()

    device = threading.Thread(target=note)
    device.start()
    while not done.is_set():
        limits.chunks("model")
        limits.keys()
    device.join()
    assert limits.chunks("model")


# Kept


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "chunks" / "cuda-cuda-0.json"


def kept(table: Path, *, backend: str = "cuda", device_name: str = "A device") -> MeasuredLimits:
    return MeasuredLimits(table, backend=backend, device_name=device_name)


def learn(limits: MeasuredLimits) -> None:
    for rows in (1, 2, 4):
        for _ in range(CALLS_SURE):
            limits.note(SMALL, rows, 0.01)
    limits.note_too_large(SMALL, 16)
    limits.save(at_once=True)


def test_what_was_learned_outlives_the_process(table: Path) -> None:
    before = kept(table)
    learn(before)
    after = kept(table)
    assert after.rows_max(SMALL) == before.rows_max(SMALL) == 8
    (told,), (told_before,) = after.chunks("model"), before.chunks("model")
    assert told == told_before.model_copy(update={"fill": None})  # nothing was made here yet
    assert after.expected_s(SMALL, 3) == pytest.approx(0.01)
    assert [file.name for file in table.parent.iterdir()] == [table.name]


@pytest.mark.parametrize("of", [{"backend": "ascend"}, {"device_name": "Another device"}])
def test_what_another_device_taught_is_not_believed(
    table: Path, of: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    learn(kept(table))
    assert kept(table, **of).keys() == ()
    assert "another device" in caplog.text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: json.dumps(json.loads(content) | {"version": 2}),
        lambda content: content.replace("0.01", "-1"),
        lambda content: content.replace("0.01", "NaN"),
        lambda content: content.replace('"rows":1,', '"rows":0,'),
        lambda content: "[]",
    ],
    ids=["cut", "of another version", "negative", "no number", "no rows", "something else"],
)
def test_a_file_that_does_not_fit_is_ignored_with_a_warning_and_written_anew(
    table: Path, spoil: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    learn(kept(table))
    table.write_text(spoil(table.read_text()))
    limits = kept(table)
    assert limits.keys() == ()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    learn(limits)
    assert kept(table).keys() == (SMALL,)


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    learn(kept(tmp_path / "file" / "table.json"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2  # read, and written


def test_it_is_written_seldom_and_only_when_something_is_new(table: Path) -> None:
    clock = Clock()
    limits = MeasuredLimits(table, clock=clock)
    limits.save(at_once=True)
    assert not table.exists()

    def written() -> bool:
        limits.save()
        there = table.exists()
        table.unlink(missing_ok=True)
        return there

    limits.note(SMALL, 1, 0.01)
    assert written()
    limits.note(SMALL, 1, 0.01)
    assert not written()
    clock.now_s += SAVE_EVERY_S
    assert written()
    clock.now_s += SAVE_EVERY_S
    assert not written()
