"""Whatever runs come, in whatever order and at whatever pace: what holds of the chunks that the line gives."""

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chunks import STEP_S, GivenLimits, call, member
from workers.chunks.line import PATIENCE_SHARE, Line, Waiting, WaitUntil
from workers.chunks.members import Member

KEYS = ("unet 64", "unet 128", "controlnet")
PREPARES = "text encoder"
# No sums of these are a quarter of a step apart: who comes just as the patience ends is neither late nor in time.
PAUSES_S = (0.0, 0.1037, 0.2113, 0.5179, 3.0341)


@dataclass(frozen=True)
class Script:
    """What a run does: its calls, each as (how long after the last result it comes, its key, its rows)."""

    calls: tuple[tuple[float, str, int], ...]
    alone: bool
    size_max: int | None


@dataclass
class Forward:
    """A chunk that was made, after the device stood still for `idle_s` though calls waited."""

    calls: tuple[Waiting, ...]
    idle_s: float


@dataclass
class Told:
    """All that happened: calls in the order in which they came, and forwards in which they were made."""

    came: list[Waiting] = field(default_factory=list)
    forwards: list[tuple[int, Forward]] = field(default_factory=list)
    """With each, how many calls had come when it began."""
    members: list[Member] = field(default_factory=list)


def calls_of(keys: tuple[str, ...], least: int, most: int) -> st.SearchStrategy[list[tuple[float, str, int]]]:
    call = st.tuples(st.sampled_from(PAUSES_S), st.sampled_from(keys), st.integers(1, 3))
    return st.lists(call, min_size=least, max_size=most)


scripts = st.builds(
    Script,
    calls=st.tuples(calls_of((PREPARES,), 0, 3), calls_of(KEYS, 1, 8)).map(lambda parts: (*parts[0], *parts[1])),
    alone=st.booleans(),
    size_max=st.sampled_from([None, None, 1, 2, 4]),
)


def play(runs: list[Script], rows_max: int, step_s: float) -> Told:
    """Let the runs go through their calls, on a clock of their own."""
    line, told, now_s, numbers = Line(GivenLimits(rows_max)), Told(), 0.0, itertools.count()
    coming: list[tuple[float, int, Member, list[tuple[float, str, int]]]] = []

    def comes_later(who: Member, calls: list[tuple[float, str, int]]) -> None:
        if calls:
            heapq.heappush(coming, (now_s + calls[0][0], next(numbers), who, calls))
        else:
            line.leave(who)

    for run in runs:
        told.members.append(member(alone=run.alone, size_max=run.size_max))
        comes_later(told.members[-1], list(run.calls))
    left = {id(who): list(run.calls) for who, run in zip(told.members, runs, strict=True)}
    idle_s = 0.0
    while coming or not line.empty:
        while coming and coming[0][0] <= now_s:
            comes_s, _, who, calls = heapq.heappop(coming)
            _, key, rows = calls[0]
            told.came.append(Waiting(call(key, rows=rows), who, comes_s, denoises=key != PREPARES))
            left[id(who)] = calls[1:]
            line.add(told.came[-1])
        decision = line.next(now_s)
        if isinstance(decision, tuple):
            told.forwards.append((len(told.came), Forward(decision, idle_s)))
            idle_s = 0.0
            now_s += step_s
            line.made(decision, step_s, now_s)
            for each in decision:
                assert each.member is not None
                comes_later(each.member, left[id(each.member)])
            continue
        until_s = min([coming[0][0]] if coming else [], default=float("inf"))
        if isinstance(decision, WaitUntil):
            assert decision.time_s > now_s, "it would turn in circles"
            until_s = min(until_s, decision.time_s)
            idle_s += until_s - now_s
        now_s = until_s
    return told


@settings(max_examples=300, deadline=None)
@given(st.lists(scripts, min_size=1, max_size=7), st.integers(1, 6), st.sampled_from([STEP_S / 8, STEP_S]))
def test_every_call_is_made_once_with_its_like_and_in_its_turn(
    runs: list[Script], rows_max: int, step_s: float
) -> None:
    told = play(runs, rows_max, step_s)
    made = [each for _, forward in told.forwards for each in forward.calls]
    assert Counter(map(id, made)) == Counter(map(id, told.came)), "each is made, and once"
    for _, forward in told.forwards:
        assert len({each.call.key for each in forward.calls}) == 1
        assert len({each.key for each in forward.calls}) == 1
        assert len({each.member for each in forward.calls}) == len(forward.calls)
        assert len(forward.calls) == 1 or not any(each.member and each.member.alone for each in forward.calls)
        sizes_max = [each.member.size_max for each in forward.calls if each.member and each.member.size_max]
        assert len(forward.calls) <= min(sizes_max, default=len(forward.calls))
        assert len(forward.calls) == 1 or sum(each.call.rows for each in forward.calls) <= rows_max
        assert forward.idle_s <= PATIENCE_SHARE * STEP_S + 1e-9, "no call waits longer while the device is free"


@settings(max_examples=300, deadline=None)
@given(st.lists(scripts, min_size=1, max_size=7), st.integers(1, 6), st.sampled_from([STEP_S / 8, STEP_S]))
def test_no_call_is_overtaken_by_more_than_one_forward_of_each_other_key_but_those_that_prepare(
    runs: list[Script], rows_max: int, step_s: float
) -> None:
    told = play(runs, rows_max, step_s)
    came_as = {id(each): number for number, each in enumerate(told.came)}
    made_in = {id(each): number for number, (_, forward) in enumerate(told.forwards) for each in forward.calls}
    for each in told.came:
        own, place = came_as[id(each)], made_in[id(each)]
        overtaking = Counter(
            forward.calls[0].key
            for came, forward in told.forwards[:place]
            if came > own and all(came_as[id(other)] > own for other in forward.calls)
        )
        assert each.key not in overtaking, "nor is it overtaken by its like"
        assert {times for key, times in overtaking.items() if key.text != PREPARES} <= {1}


@settings(max_examples=300, deadline=None)
@given(st.lists(scripts, min_size=1, max_size=7), st.integers(1, 6))
def test_the_device_stands_still_in_vain_for_one_step_per_member_at_most(runs: list[Script], rows_max: int) -> None:
    told = play(runs, rows_max, STEP_S)
    in_vain = [forward for _, forward in told.forwards if forward.idle_s > PATIENCE_SHARE * STEP_S - 1e-9]
    assert len(in_vain) <= sum(each.misses for each in told.members)
    assert max(each.misses for each in told.members) * PATIENCE_SHARE <= 1
