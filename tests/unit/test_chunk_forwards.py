"""How a chunk is made: as one, and where that fails in pieces, so that each run has its own result or its own error."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.support.chunks import GivenLimits, TellingJoint, call, member
from workers.backends.stub import StubDriver
from workers.chunks.calls import DeviceCall
from workers.chunks.forwards import Forwards
from workers.chunks.line import Waiting


class Lost(RuntimeError):
    """The device is."""


class TellingDriver(StubDriver):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.released = 0
        self.on_release: Callable[[], object] = lambda: None

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, Lost)

    def release(self) -> None:
        self.released += 1
        self.on_release()


class Workshop:
    """Makes chunks of made-up calls."""

    def __init__(self) -> None:
        self.driver = TellingDriver()
        self.limits = GivenLimits()
        self.forwards = Forwards(self.driver, self.limits)

    def made(self, *calls: DeviceCall) -> list[Any]:
        """What became of calls that are made as one: the result of each, or its error."""
        waiting = tuple(Waiting(each, member(), 0.0) for each in calls)
        for each in waiting:
            assert each.future.set_running_or_notify_cancel()
        for made in self.forwards.make(waiting):
            made.settle()
        assert all(each.future.done() for each in waiting)
        return [each.future.exception() or each.future.result() for each in waiting]


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


def above(rows: int) -> Callable[[Sequence[DeviceCall]], None]:
    """Memory for so many rows in one call."""

    def check(calls: Sequence[DeviceCall]) -> None:
        if sum(each.rows for each in calls) > rows:
            raise MemoryError("too many")

    return check


def fitting(rows: int) -> Callable[..., tuple[Any, ...]]:
    """A module that has memory for so many rows, and gives them back."""

    def function(*arguments: Any) -> tuple[Any, ...]:
        if len(arguments) > rows:
            raise MemoryError("too many")
        return arguments

    return function


def test_calls_of_a_chunk_are_made_as_one_and_each_gets_its_own_result(workshop: Workshop) -> None:
    joint = TellingJoint()
    calls = [call("unet", lambda *rows: rows, number, joint=joint, rows=1) for number in range(4)]
    assert workshop.made(*calls) == [(0,), (1,), (2,), (3,)]
    assert joint.sizes == [4]
    assert workshop.limits.noted == [("unet", 4)]


def test_an_error_among_them_has_each_made_alone_with_its_own_error_if_any(workshop: Workshop) -> None:
    joint = TellingJoint()
    spoiled, exits = ValueError("its own"), SystemExit("its own too")
    functions = [lambda: "first", raising(spoiled), lambda: "third", raising(exits)]
    made = workshop.made(*(call("unet", function, joint=joint) for function in functions))
    assert made == ["first", spoiled, "third", exits]
    assert workshop.limits.noted == [("unet", 1)] * 2, "what failed measures nothing"


def test_an_error_of_the_merging_itself_is_nobodys(workshop: Workshop) -> None:
    def spoil(_: object) -> None:
        raise ValueError("shapes do not agree")

    joint = TellingJoint(spoil)
    assert workshop.made(*(call("unet", lambda: "made", joint=joint) for _ in range(3))) == ["made"] * 3


def test_runs_whose_calls_cannot_be_made_as_one_share_no_further_call_but_those_beside_a_bad_one_do() -> None:
    def alone_after(*functions: Callable[..., Any]) -> list[bool]:
        waiting = tuple(Waiting(call("unet", each, joint=TellingJoint(spoil)), member(), 0.0) for each in functions)
        for made in Forwards(TellingDriver(), GivenLimits()).make(waiting):
            assert len(made.calls) == 1
        return [each.member.alone for each in waiting if each.member is not None]

    def spoil(_: object) -> None:
        raise ValueError("shapes do not agree")

    assert alone_after(lambda: "made", lambda: "made") == [True, True]
    assert alone_after(lambda: "made", raising(ValueError("its own"))) == [False, False]


def test_a_device_that_gives_no_memory_back_ends_no_call(workshop: Workshop) -> None:
    workshop.driver.on_release = raising(RuntimeError("an earlier kernel failed"))
    joint = TellingJoint(above(1))

    assert workshop.made(*(call("unet", lambda: "made", joint=joint) for _ in range(2))) == ["made"] * 2


def test_what_a_call_held_that_failed_goes_with_its_error(workshop: Workshop) -> None:
    class Tensor:
        pass

    held: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise ValueError("its own")

    gc.disable()  # or it may come just in time
    try:
        workshop.made(call("unet", fail))
        assert held[0]() is None
    finally:
        gc.enable()


def test_results_that_are_not_as_many_as_the_calls_are_given_to_nobody(workshop: Workshop) -> None:
    class Uneven(TellingJoint):
        def together(self, calls: Sequence[DeviceCall]) -> Sequence[Any]:
            return ["whose?"]

    joint = Uneven()
    assert workshop.made(*(call("unet", lambda: "made", joint=joint) for _ in range(2))) == ["made"] * 2


def test_a_chunk_too_large_for_memory_is_halved_until_it_fits_and_the_limits_learn(workshop: Workshop) -> None:
    joint = TellingJoint(above(2))
    calls = [call("unet", lambda *rows: rows, number, joint=joint) for number in range(8)]
    assert workshop.made(*calls) == [(number,) for number in range(8)]
    assert joint.sizes == [8, 4, 2, 2, 4, 2, 2]
    assert workshop.limits.too_large == [("unet", 8), ("unet", 4), ("unet", 4)]
    assert workshop.driver.released == 3


def test_a_single_call_too_large_for_memory_is_made_in_halves_of_its_rows(workshop: Workshop) -> None:
    one = call("unet", fitting(2), *range(7), rows=7)
    assert workshop.made(one) == [(0, 1, 2, 3, 4, 5, 6)]
    assert workshop.limits.too_large == [("unet", 7), ("unet", 3), ("unet", 4)]


def test_a_single_row_that_does_not_fit_fails_with_what_it_was_and_harms_no_other(workshop: Workshop) -> None:
    joint = TellingJoint(above(1))
    fits, greedy = call("unet", fitting(1), 5, joint=joint), call("unet", fitting(0), 6, 7, joint=joint, rows=2)
    waiting = [Waiting(each, member(), 0.0) for each in (fits, greedy)]
    for each in waiting:
        each.future.set_running_or_notify_cancel()
    for made in workshop.forwards.make(tuple(waiting)):
        made.settle()
    assert waiting[0].future.result() == (5,)
    assert isinstance(waiting[1].future.exception(), MemoryError)
    told = waiting[1].member
    assert told is not None
    assert told.too_large is not None
    assert (told.too_large.part, told.too_large.rows) == ("unet", 1)


def test_what_filled_the_memory_is_gone_before_it_is_given_back_and_tried_again(workshop: Workshop) -> None:
    class Tensor:
        pass

    held: list[weakref.ref[Tensor]] = []
    alive_at_release: list[bool] = []

    def fill(calls: Sequence[DeviceCall]) -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        if len(calls) > 1:
            raise MemoryError("too many")

    def look() -> None:
        gc.collect()
        alive_at_release.append(any(each() is not None for each in held))

    workshop.driver.on_release = look
    joint = TellingJoint(fill)
    workshop.made(*(call("unet", lambda: "made", joint=joint) for _ in range(2)))
    assert alive_at_release == [False]


def test_a_lost_device_is_tried_no_more(workshop: Workshop) -> None:
    lost = Lost("gone")
    made: list[str] = []

    def break_down(_: object) -> None:
        raise lost

    joint = TellingJoint(break_down)
    assert workshop.made(*(call("unet", made.append, "made", joint=joint) for _ in range(3))) == [lost] * 3
    assert made == []


def test_each_try_counts_as_a_call_of_its_own_in_how_long_the_device_is_busy(workshop: Workshop) -> None:
    seen: list[float | None] = []

    def look(*_: object) -> None:
        seen.append(workshop.forwards.since_s)
        if len(seen) == 1:
            raise ValueError("once")

    joint = TellingJoint(look)
    workshop.made(*(call("unet", look, joint=joint) for _ in range(2)))
    assert len(set(seen)) == 3
    assert None not in seen
    assert workshop.forwards.since_s is None
