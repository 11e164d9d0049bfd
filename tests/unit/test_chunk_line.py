"""Which calls the line has made next, and together; on a clock that the test moves."""

from typing import Any

import pytest

from tests.support.chunks import GivenLimits, Story, call, member
from workers.chunks.calls import DeviceCall
from workers.chunks.line import WaitUntil


@pytest.fixture
def story() -> Story:
    return Story()


# What is made together


def test_calls_of_one_key_are_made_as_one_and_those_of_another_in_turn(story: Story) -> None:
    a, b, c, d = (member() for _ in range(4))
    for who, key in ((a, "unet 64"), (b, "unet 128"), (c, "unet 64"), (d, "unet 128")):
        story.comes(who, key)
    assert story.makes() == [a, c]
    assert story.makes() == [b, d]
    assert story.makes() == []


def test_a_run_that_is_to_be_alone_shares_with_nobody(story: Story) -> None:
    a, alone, c = member(), member(alone=True), member()
    for who in (a, alone, c):
        story.comes(who)
    assert story.makes() == [a, c]
    assert story.makes() == [alone]


def test_a_call_that_cannot_be_made_with_others_is_made_by_itself(story: Story) -> None:
    a, b = member(), member()
    story.comes(a)
    story.comes_with(DeviceCall(None, lambda: None, key=call().key), b)  # of the same key, but without a joint
    story.comes_with(call(), None)  # of no run
    assert [len(story.makes()) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "rows_max", "chunks"),
    [
        ([1, 1, 1, 1], 64, [4]),
        ([1, 1, 1, 1], 3, [3, 1]),
        ([2, 2, 2], 5, [2, 1]),
        ([1, 1, 1], 1, [1, 1, 1]),
        ([8, 1, 1], 4, [1, 2]),  # larger than the limit: it runs, by itself
        ([1, 8, 1], 4, [1, 1, 1]),  # nobody is overtaken by one that would still fit
    ],
)
def test_a_chunk_takes_the_oldest_as_far_as_rows_allow(rows: list[int], rows_max: int, chunks: list[int]) -> None:
    story = Story(GivenLimits(rows_max))
    for each in rows:
        story.comes(member(), rows=each, denoises=False)
    assert [len(story.makes()) for _ in chunks] == chunks
    assert story.makes() == []


@pytest.mark.parametrize(("sizes_max", "chunks"), [([None, 2, None], [2, 1]), ([1, 1], [1, 1]), ([3, 3, 3, 3], [3, 1])])
def test_a_chunk_has_no_more_members_than_any_of_them_allows(sizes_max: list[int | None], chunks: list[int]) -> None:
    story = Story()
    for size_max in sizes_max:
        story.comes(member(size_max=size_max), denoises=False)
    assert [len(story.makes()) for _ in chunks] == chunks


def test_a_call_that_is_cancelled_while_it_waits_is_in_no_chunk(story: Story) -> None:
    a, b = member(), member()
    story.comes(a).future.cancel()
    kept = story.comes(b)
    assert story.makes() == [b]
    assert not kept.future.cancel(), "what is being made can no longer be cancelled"


def test_a_cancelled_call_takes_no_room_from_those_that_are_made() -> None:
    story = Story(GivenLimits(rows=2))
    a, b, c = (member() for _ in range(3))
    waiting = [story.comes(who) for who in (a, b, c)]
    waiting[1].future.cancel()
    assert story.makes() == [a, c]


# Turns


def test_a_lone_job_waits_for_one_forward_of_an_endless_stream_of_joiners(story: Story) -> None:
    stream = [member() for _ in range(3)]
    for who in stream:
        story.comes(who)
    story.makes()
    for round_ in range(10):
        for who in stream:
            story.comes(who)
        lone = member()
        story.comes(lone, "lone")
        for _ in range(5):
            story.comes(member())  # whoever joins, joins the forward that stands before it
        assert lone not in story.makes()
        story.comes(stream[0])
        assert story.makes() == [lone], f"in round {round_}"
        story.makes()


# The window


def test_the_first_call_of_a_run_waits_for_others_as_long_as_its_window(story: Story) -> None:
    a, b = member(window_s=0.5), member(window_s=0.5)
    came_s = story.now_s
    story.comes(a)
    assert story.next() == WaitUntil(came_s + 0.5)
    story.now_s += 0.3
    story.comes(b)
    assert story.next() == WaitUntil(came_s + 0.5), "the window is that of the first"
    assert story.makes() == [a, b]
    for who in (a, b):
        story.line.leave(who)
    story.comes(a)
    assert story.makes() == [a], "only its first call does"
    assert story.waited_s == pytest.approx(0.2)


def test_the_window_ends_once_the_chunk_is_full() -> None:
    story = Story(GivenLimits(rows=2))
    a, b = member(window_s=60.0), member(window_s=60.0)
    story.comes(a)
    assert isinstance(story.next(), WaitUntil)
    story.comes(b)
    assert story.makes() == [a, b]
    assert story.waited_s == 0


def test_whoever_can_join_those_in_flight_waits_for_no_window(story: Story) -> None:
    a, joiner = member(), member(window_s=60.0)
    story.comes(a)
    story.makes()
    story.comes(joiner)
    story.comes(a)
    assert story.makes() == [joiner, a]
    assert story.waited_s == 0


@pytest.mark.parametrize("bounds", [{"alone": True}, {"size_max": 1}])
def test_whoever_shares_with_nobody_waits_for_no_window(story: Story, bounds: dict[str, Any]) -> None:
    a = member(window_s=60.0, **bounds)
    story.comes(a)
    assert story.makes() == [a]
    assert story.waited_s == 0


def test_a_run_in_its_window_holds_up_no_other(story: Story) -> None:
    patient, other = member(window_s=60.0), member()
    story.comes(patient)
    story.comes(other, "other")
    assert story.makes() == [other]
    assert isinstance(story.next(), WaitUntil)


# What members learn


def test_a_member_knows_the_largest_and_the_mean_size_and_its_group(story: Story) -> None:
    a, b, lone = (member() for _ in range(3))
    story.comes(a, "text encoder", denoises=False)
    story.makes()
    story.comes(a)
    story.makes()
    story.comes(a)
    story.comes(b)
    story.makes()
    story.comes(lone, "other")
    story.makes()
    assert [(each.largest, each.mean) for each in (a, b, lone)] == [(2, 1.5), (2, 2.0), (1, 1.0)]
    assert a.group_id == b.group_id is not None
    assert lone.group_id is None


def test_a_joiner_takes_the_groups_id_and_of_two_groups_that_meet_the_older_one_stays(story: Story) -> None:
    a, b, c, d, e = (member() for _ in range(5))
    for pair, key in (((a, b), "first"), ((c, d), "second")):
        for who in pair:
            story.comes(who, key)
        story.makes()
    first, second = a.group_id, c.group_id
    assert first != second
    story.comes(e, "second")
    story.comes(d, "second")
    story.makes()
    assert e.group_id == second
    story.comes(d, "third")
    story.comes(b, "third")
    story.makes()
    assert {each.group_id for each in (a, b, c, d, e)} == {first}
