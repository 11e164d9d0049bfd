"""Which calls the line has made next, together, and for whom it waits; on a clock that the test moves."""

from typing import Any

import pytest

from tests.support.chunks import STEP_S, GivenLimits, call, member
from workers.chunks.calls import DeviceCall
from workers.chunks.line import PATIENCE_SHARE, Line, Waiting, WaitUntil
from workers.chunks.members import MISSES_MAX, Member

PATIENCE_S = PATIENCE_SHARE * STEP_S


class Story:
    """A line with a clock: calls come, and are made."""

    def __init__(self, limits: GivenLimits | None = None) -> None:
        self.limits = limits or GivenLimits()
        self.line = Line(self.limits)
        self.now_s = 100.0
        self.waited_s = 0.0

    def comes(self, who: Member | None, key: str = "unet", *, rows: int = 1, denoises: bool = True) -> Waiting:
        return self.comes_with(call(key, rows=rows), who, denoises=denoises)

    def comes_with(self, it: DeviceCall, who: Member | None, *, denoises: bool = True) -> Waiting:
        waiting = Waiting(it, who, self.now_s, denoises)
        self.line.add(waiting)
        return waiting

    def next(self) -> tuple[Waiting, ...] | WaitUntil | None:
        return self.line.next(self.now_s)

    def makes(self, elapsed_s: float = STEP_S) -> list[Member | None]:
        """Whose calls are made next, once nothing is waited for any more: as one, in order."""
        while isinstance(decision := self.next(), WaitUntil):
            self.waited_s += decision.time_s - self.now_s
            self.now_s = decision.time_s
        if decision is None:
            return []
        self.now_s += elapsed_s
        self.line.made(decision, elapsed_s, self.now_s)
        return [each.member for each in decision]


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


# For whom it waits


def test_those_who_shared_the_last_forward_are_waited_for_a_quarter_of_a_step_at_most(story: Story) -> None:
    a, b = member(), member()
    story.comes(a)
    story.comes(b)
    assert story.makes() == [a, b]
    began_s = story.now_s
    story.comes(a)
    assert story.next() == WaitUntil(began_s + PATIENCE_S)
    story.now_s += PATIENCE_S / 2
    story.comes(b)
    assert story.makes() == [a, b]
    story.comes(a)
    assert story.makes() == [a], "b is late, and goes by itself"
    assert story.waited_s == pytest.approx(PATIENCE_S)


def test_where_nothing_is_known_of_a_call_the_last_one_tells_how_long_to_wait() -> None:
    story = Story(GivenLimits(expected_s=None))
    a, b = member(), member()
    story.comes(a)
    story.comes(b)
    story.makes(elapsed_s=8.0)
    story.comes(a)
    assert story.next() == WaitUntil(story.now_s + 8.0 * PATIENCE_SHARE)


def test_who_missed_a_forward_is_not_waited_for_in_the_next_one(story: Story) -> None:
    a, b, c = (member() for _ in range(3))
    for who in (a, b, c):
        story.comes(who)
    story.makes()
    story.comes(a)
    story.comes(b)
    assert story.makes() == [a, b]
    waited_s = story.waited_s
    for _ in range(3):
        story.comes(a)
        story.comes(b)
        assert story.makes() == [a, b]
    assert story.waited_s == waited_s


def test_a_member_that_stalls_again_and_again_delays_the_others_by_one_step_in_total(story: Story) -> None:
    a, stalling = member(), member()
    for _ in range(20):
        story.comes(stalling)  # it comes back, shares a forward, and stalls
        story.comes(a)
        assert set(story.makes()) == {a, stalling}
        story.comes(a)
        assert story.makes() == [a]
    assert stalling.misses == MISSES_MAX
    assert story.waited_s == pytest.approx(STEP_S)


def test_one_that_came_late_while_others_kept_the_device_busy_delayed_nobody_and_is_not_blamed(story: Story) -> None:
    a, late, other = (member() for _ in range(3))
    story.comes(a)
    story.comes(late)
    story.makes()
    story.comes(other, "vae", denoises=False)
    story.comes(a)
    assert story.makes() == [other]
    assert story.makes() == [a]
    assert (late.misses, story.waited_s) == (0, 0.0)


@pytest.mark.parametrize("leaves", ["says so", "settles on another key"])
def test_a_member_that_has_left_is_not_waited_for(story: Story, leaves: str) -> None:
    a, b = member(), member()
    story.comes(a)
    story.comes(b)
    story.makes()
    if leaves == "says so":
        story.line.leave(b)
    else:
        for _ in range(2):
            story.comes(b, "without guidance")
            assert story.makes() == [b]
    story.comes(a)
    assert story.makes() == [a]
    assert story.waited_s == 0


def test_nobody_waits_for_those_who_come_only_once(story: Story) -> None:
    a, b = member(), member()
    story.comes(a, "text encoder", denoises=False)
    story.comes(b, "text encoder", denoises=False)
    assert story.makes() == [a, b]
    story.comes(a, "text encoder", denoises=False)
    assert story.makes() == [a]
    assert story.waited_s == 0


def test_nobody_is_waited_for_who_would_find_no_room() -> None:
    story = Story(GivenLimits(rows=4))
    a, b = member(), member()
    story.comes(a, rows=2)
    story.comes(b, rows=2)
    assert story.makes() == [a, b]
    story.comes(a, rows=3)
    assert story.makes() == [a]
    assert story.waited_s == 0


def test_runs_that_go_to_two_modules_in_turn_meet_at_each(story: Story) -> None:
    """A ControlNet and a denoiser: were each made for whoever came first, they would pass each other for ever."""
    a, b = member(), member()
    story.comes(a, "controlnet")
    story.comes(b, "controlnet")
    assert story.makes() == [a, b]
    story.comes(a, "unet")
    story.comes(b, "unet")
    assert story.makes() == [a, b]
    for key in ("controlnet", "unet") * 3:
        story.comes(a, key)
        assert isinstance(story.next(), WaitUntil)
        story.now_s += PATIENCE_S / 2  # b's own steps take longer
        story.comes(b, key)
        assert story.makes() == [a, b]


def test_the_call_that_keeps_a_member_away_is_made_first(story: Story) -> None:
    a, b = member(), member()
    story.comes(a)
    story.comes(b)
    story.makes()
    story.comes(a)
    story.comes(b, "preview", denoises=False)
    assert story.makes(elapsed_s=PATIENCE_S / 4) == [b]
    story.comes(b)
    assert story.makes() == [a, b]
    assert story.waited_s == 0


def test_a_call_is_passed_by_one_forward_of_each_other_key_at_most(story: Story) -> None:
    a, b = member(), member()
    story.comes(a)
    story.comes(b)
    story.makes()
    waits = story.comes(a)
    for _ in range(2):
        story.comes(b, "preview", denoises=False)
        made = story.makes(elapsed_s=PATIENCE_S / 8)
        if waits.future.running():
            break
        assert made == [b]
    assert made == [a], "the second preview does not pass it"


# For whom it waits: those who prepare to join


@pytest.fixture
def eight_run(story: Story) -> list[Member]:
    """Eight that share a forward, and have come for the next one."""
    running = [member() for _ in range(8)]
    for who in running:
        story.comes(who)
    assert story.makes() == running
    return running


def encodes(story: Story, who: Member) -> None:
    story.comes(who, "text encoder", denoises=False)
    assert story.makes(elapsed_s=PATIENCE_S / 16) == [who]


def test_a_run_encodes_its_prompts_before_the_next_step_of_the_others_and_joins_it(
    story: Story, eight_run: list[Member]
) -> None:
    joiner = member()
    for who in eight_run:
        story.comes(who)
    for _ in range(4):
        encodes(story, joiner)
        assert isinstance(story.next(), WaitUntil)
        story.now_s += PATIENCE_S / 16
    story.comes(joiner)
    assert story.makes() == [*eight_run, joiner]


def test_those_who_prepare_hold_up_a_step_for_a_quarter_of_it_and_a_call_at_most(
    story: Story, eight_run: list[Member]
) -> None:
    joiners = [member() for _ in range(8)]
    for who in eight_run:
        story.comes(who)
    for joiner in joiners:
        story.comes(joiner, f"text encoder {id(joiner)}", denoises=False)
    for joiner in joiners[:3]:
        assert story.makes(elapsed_s=0.4 * PATIENCE_S) == [joiner]
    assert story.makes() == eight_run
    assert story.waited_s == 0


def test_one_that_prepares_and_stalls_again_and_again_delays_the_others_by_one_step_in_total(
    story: Story, eight_run: list[Member]
) -> None:
    stalling = member()
    for _ in range(10):
        for who in eight_run:
            story.comes(who)
        story.comes(stalling, "text encoder", denoises=False)
        assert {*story.makes(PATIENCE_S / 16), *story.makes(PATIENCE_S / 16)} == {*eight_run, stalling}
    assert stalling.misses == MISSES_MAX
    assert PATIENCE_S < story.waited_s <= STEP_S


@pytest.mark.parametrize("why", ["another model", "another size", "it shares with nobody", "it has left"])
def test_nobody_waits_for_one_that_prepares_something_else(story: Story, eight_run: list[Member], why: str) -> None:
    match why:
        case "another model":
            other = member("another")
        case "another size":
            other = Member("model", "128x128 fp32")
        case _:
            other = member(alone=why == "it shares with nobody")
    if why != "it has left":
        for who in eight_run:
            story.comes(who)
        story.comes(other, "text encoder", denoises=False)
        assert story.makes() == eight_run
        assert story.makes() == [other]
    else:
        encodes(story, other)
        story.line.leave(other)
    for who in eight_run:
        story.comes(who)
    assert story.makes() == eight_run
    assert story.waited_s == 0


def test_a_run_that_prepares_to_join_a_full_chunk_goes_before_it_and_is_not_waited_for() -> None:
    story = Story(GivenLimits(rows=2))
    a, b, joiner = (member() for _ in range(3))
    story.comes(a)
    story.comes(b)
    story.makes()
    story.comes(a)
    story.comes(b)
    encodes(story, joiner)
    assert story.makes() == [a, b]
    assert story.waited_s == 0


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
