"""For whom the line of device calls waits, how long, and for whom no more; on a clock that the test moves."""

import pytest

from tests.support.chunks import STEP_S, GivenLimits, Story, member
from workers.chunks.line import PATIENCE_SHARE, WaitUntil
from workers.chunks.members import MISSES_MAX, Member

PATIENCE_S = PATIENCE_SHARE * STEP_S


@pytest.fixture
def story() -> Story:
    return Story()


# Those who shared the last forward


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


# Those who prepare to join


@pytest.fixture
def eight_run(story: Story) -> list[Member]:
    """Eight that have shared a forward."""
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
