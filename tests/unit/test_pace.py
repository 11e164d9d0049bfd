"""The pace of a model: seconds per unit of work, as measured."""

import pytest

from workers.pace import NEWEST_WEIGHS, Pace


class Clock:
    """A clock that the test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock)


def run(pace: Pace, clock: Clock, seconds: float, units: float | None = 1.0) -> None:
    with pace.measured("model", units):
        clock.now_s += seconds


def test_nothing_is_told_until_something_ran(pace: Pace, clock: Clock) -> None:
    assert pace.seconds_per_unit("model") is None
    run(pace, clock, 3.0, units=None)
    assert pace.seconds_per_unit("model") is None


def test_the_first_run_is_taken_as_it_is_and_later_ones_move_the_average(pace: Pace, clock: Clock) -> None:
    run(pace, clock, 6.0, units=2.0)
    assert pace.seconds_per_unit("model") == pytest.approx(3.0)
    run(pace, clock, 8.0)
    assert pace.seconds_per_unit("model") == pytest.approx(3.0 + NEWEST_WEIGHS * 5.0)
    assert pace.seconds_per_unit("other") is None


def test_time_without_a_run_counts_for_nobody(pace: Pace, clock: Clock) -> None:
    run(pace, clock, 1.0)
    clock.now_s += 1000.0
    run(pace, clock, 1.0)
    assert pace.seconds_per_unit("model") == pytest.approx(1.0)


def test_runs_at_the_same_time_are_counted_their_share(pace: Pace, clock: Clock) -> None:
    with pace.measured("one", 1.0):
        clock.now_s += 2.0  # alone
        with pace.measured("two", 1.0):
            clock.now_s += 4.0  # together
    assert pace.seconds_per_unit("two") == pytest.approx(2.0)
    assert pace.seconds_per_unit("one") == pytest.approx(4.0)


def test_a_run_that_fails_tells_nothing_and_leaves_the_device_to_the_others(pace: Pace, clock: Clock) -> None:
    def fail() -> None:
        with pace.measured("model", 1.0):
            clock.now_s += 9.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert pace.seconds_per_unit("model") is None
    run(pace, clock, 2.0)
    assert pace.seconds_per_unit("model") == pytest.approx(2.0)
