"""What the canary takes for a stall, and what it does about one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from omnirt_tasks.errors import StoreUnavailable
from tests.support.waiting import eventually
from workers.canary import RESTARTS_MAX, Canary, Heads, Stall

AFTER_S = 5.0

Look = tuple[float, Heads, int]


@pytest.mark.parametrize(
    ("looks", "stalls"),
    [
        ([(0, {"q": "a"}, 0), (4.9, {"q": "a"}, 0)], False),
        ([(0, {"q": "a"}, 0), (5.0, {"q": "a"}, 0)], True),
        ([(0, {"q": "a"}, 0), (3, {"q": "b"}, 0), (6, {"q": "b"}, 0)], False),
        ([(0, {"q": "a"}, 0), (3, {}, 0), (6, {"q": "a"}, 0)], False),
        ([(0, {"q": "a"}, 0), (3, {"q": "a"}, 1), (6, {"q": "a"}, 1)], False),
        ([(0, {"q": "a"}, 0), (3, {"q": "a"}, 1), (8, {"q": "a"}, 1)], True),
        ([(0, {"q": "a", "r": "x"}, 0), (3, {"q": "b", "r": "x"}, 0), (6, {"q": "c", "r": "x"}, 0)], True),
        ([(0, {}, 0), (9, {"q": "a"}, 0)], False),
    ],
    ids=[
        "not long enough",
        "long enough",
        "another worker took it",
        "it was gone in between",
        "this worker took another",
        "and then no more",
        "on one list of two",
        "a list that was empty",
    ],
)
def test_a_stall_is_one_message_that_waits_while_nothing_is_taken(looks: list[Look], stalls: bool) -> None:
    stall = Stall(AFTER_S)

    seen = [stall.seen(heads, taken, now_s=now_s) for now_s, heads, taken in looks]

    assert seen == [False] * (len(looks) - 1) + [stalls]


@dataclass
class Broken:
    """Consumption that takes nothing; `heads` is what waits in its list."""

    room: bool = True
    hears: bool = True
    mended_by: int | None = None
    restarts: int = 0
    waiting: bool = True
    lost: list[bool] = field(default_factory=list)

    def admit(self, messages: int) -> None: ...

    def end(self, status: int) -> None: ...

    def has_room(self) -> bool:
        return self.room

    def taken(self) -> int:
        return 0 if self.waiting else 1

    def queues(self) -> Sequence[str]:
        return ("q",)

    def restart(self) -> bool:
        self.restarts += 1
        self.waiting = self.restarts != self.mended_by
        return self.hears

    def heads(self, queues: Sequence[str]) -> Heads:
        return {"q": "a"} if self.waiting else {}


def looking(consumption: Broken, heads: Callable[[Sequence[str]], Heads] | None = None) -> Canary:
    return Canary(consumption, heads or consumption.heads, stall_after_s=0.02, on_lost=consumption.lost.append)


def test_a_consumer_that_comes_back_is_restarted_no_further() -> None:
    consumption = Broken(mended_by=2)
    canary = looking(consumption)
    canary.start()
    eventually(lambda: not consumption.waiting)

    consumption.waiting = True  # another day, another stall: it has as many restarts as the first
    consumption.mended_by = 2 + RESTARTS_MAX
    eventually(lambda: not consumption.waiting)

    canary.close()
    assert consumption.restarts == 2 + RESTARTS_MAX
    assert not consumption.lost


def test_a_worker_that_no_restart_mends_is_given_up_once() -> None:
    consumption = Broken()
    canary = looking(consumption)
    canary.start()

    eventually(lambda: consumption.lost)
    canary.close()
    assert consumption.lost == [True]
    assert consumption.restarts == RESTARTS_MAX


def test_a_consumer_that_does_not_hear_of_its_restart_is_given_up_at_once() -> None:
    consumption = Broken(hears=False)
    canary = looking(consumption)
    canary.start()

    eventually(lambda: consumption.lost)
    canary.close()
    assert consumption.lost == [False]
    assert consumption.restarts == 1


def test_a_full_worker_and_a_broker_that_is_away_are_no_stall() -> None:
    full = Broken(room=False)
    away = Broken()
    looks: list[str] = []

    def unreachable(queues: Sequence[str]) -> Heads:
        looks.append("look")
        if len(looks) % 2:
            return away.heads(queues)
        raise StoreUnavailable("away")

    canaries = [looking(full), looking(away, unreachable)]
    for canary in canaries:
        canary.start()
    eventually(lambda: len(looks) > 20)
    for canary in canaries:
        canary.close()

    assert full.restarts == 0
    assert away.restarts == 0
