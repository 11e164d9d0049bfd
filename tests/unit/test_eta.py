"""When a waiting job will be done: against queues that are simulated, and at the edges of what is known."""

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnirt_tasks.eta import SETTLED_S, Eta, Line, Served
from omnirt_tasks.jobs.values import ServiceTime

KEPT = 200
JOBS = 2_000


def times(*durations_s: float, kind: str = "a") -> list[ServiceTime]:
    return [ServiceTime(kind, round(duration_s * 1000)) for duration_s in durations_s]


def at(position: int, *, slots: int = 1, running: int = 1, waited_s: float = 0.0) -> Line:
    return Line(position=position, waited_s=waited_s, slots=slots, running=running)


def eta(line: Line, served: list[ServiceTime], kind: str = "a") -> Eta:
    found = Served(served).eta(line, kind)
    assert found is not None
    return found


@dataclass(frozen=True)
class Kind:
    """Jobs that take `mean_s`, and differ by `spread` of it (as a log-normal distribution does)."""

    name: str
    mean_s: float
    spread: float

    def draw_s(self, rng: random.Random) -> float:
        sigma = math.sqrt(math.log(1 + self.spread**2))
        return self.mean_s * math.exp(rng.gauss(-(sigma**2) / 2, sigma))


@dataclass(frozen=True)
class Told:
    """What a job was told when it came to wait, and how long it then took."""

    eta: Eta
    took_s: float


def simulate(kinds: list[Kind], *, slots: int, load: float, seed: int) -> list[Told]:
    """A queue in steady state, first come first served; every job that had to wait, once enough is known."""
    rng = random.Random(seed)
    rate = load * slots / fmean(kind.mean_s for kind in kinds)
    recent: deque[ServiceTime] = deque(maxlen=KEPT)
    running: list[tuple[float, int, float, str]] = []  # (its end, number, how long it takes, kind)
    waiting: deque[tuple[int, float, str]] = deque()
    asked: dict[int, tuple[float, Eta]] = {}
    told: list[Told] = []

    def pass_time(now_s: float) -> None:
        while running and running[0][0] <= now_s:
            end_s, number, took_s, kind = heapq.heappop(running)
            recent.appendleft(ServiceTime(kind, round(took_s * 1000)))
            if number in asked:
                asked_s, expected = asked.pop(number)
                told.append(Told(expected, end_s - asked_s))
            if waiting:
                following, lasts_s, of_kind = waiting.popleft()
                heapq.heappush(running, (end_s + lasts_s, following, lasts_s, of_kind))

    now_s = 0.0
    for number in range(JOBS):
        now_s += rng.expovariate(rate)
        pass_time(now_s)
        kind = rng.choice(kinds)
        lasts_s = kind.draw_s(rng)
        if len(running) < slots:
            heapq.heappush(running, (now_s + lasts_s, number, lasts_s, kind.name))
            continue
        waiting.append((number, lasts_s, kind.name))
        if len(recent) >= KEPT // 2:
            asked[number] = now_s, eta(at(len(waiting), slots=slots, running=slots), list(recent), kind.name)
    pass_time(math.inf)
    return told


ALIKE = [Kind("a", 2.0, 0.1)]
SPREAD = [Kind("a", 2.0, 0.5)]
MIXED = [Kind("short", 1.0, 0.1), Kind("long", 5.0, 0.3)]


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("kinds", [ALIKE, SPREAD, MIXED], ids=["alike", "spread", "mixed"])
def test_in_steady_state_half_end_by_the_p50_and_nine_of_ten_by_the_p90(kinds: list[Kind], slots: int) -> None:
    told = [each for seed in range(4) for each in simulate(kinds, slots=slots, load=0.9, seed=seed)]

    by_p50 = fmean(each.took_s <= each.eta.p50_s for each in told)
    by_p90 = fmean(each.took_s <= each.eta.p90_s for each in told)
    bias = median(each.took_s / each.eta.p50_s for each in told)

    assert 0.4 <= by_p50 <= 0.6, by_p50
    assert 0.82 <= by_p90 <= 0.97, by_p90
    assert 0.9 <= bias <= 1.1, bias


def test_a_job_that_finds_a_free_slot_takes_what_its_kind_takes() -> None:
    served = times(*[1.0] * 20) + times(*[60.0] * 20, kind="b")

    assert eta(at(1, slots=2), served) == Eta(1.0, 1.0)
    assert eta(at(1, slots=2), served, "b") == Eta(60.0, 60.0)


def test_slots_that_nobody_could_use_for_a_while_are_none() -> None:
    """As while a job has the device as a whole: the worker takes no other, whatever its concurrency."""
    served = times(*[10.0] * 20)
    fresh, settled = (eta(at(3, slots=8, waited_s=waited_s), served) for waited_s in (0.0, SETTLED_S))

    assert fresh.p50_s == 10.0
    assert settled.p50_s == pytest.approx(35.0, abs=3.0), "half of the one that runs, two before it, and itself"


def test_a_kind_that_was_hardly_measured_spreads_as_the_others_do() -> None:
    served = times(*(1.0, 3.0) * 10) + times(20.0, kind="b")

    found = eta(at(1, slots=2), served, "b")

    assert 15.0 < found.p50_s < 25.0
    assert found.p90_s == pytest.approx(30.0, abs=2.0)


def test_a_kind_that_was_never_measured_is_taken_for_one_of_all() -> None:
    found = eta(at(1, slots=2), times(*[1.0] * 10) + times(*[9.0] * 10, kind="b"), "new")

    assert (found.p50_s, found.p90_s) == (5.0, 9.0)


@pytest.mark.parametrize(
    ("line", "served"),
    [(at(1), []), (at(1, slots=0, running=0), times(1.0))],
    ids=["nothing was measured", "nobody serves"],
)
def test_where_nothing_tells_nothing_is_told(line: Line, served: list[ServiceTime]) -> None:
    assert Served(served).eta(line, "a") is None


durations = st.lists(st.floats(0.0, 10_000.0), min_size=1, max_size=30)


@given(durations, st.integers(1, 500), st.integers(1, 32), st.integers(0, 40), st.floats(0.0, 100.0))
def test_whatever_was_measured_both_are_times_in_order(
    durations_s: list[float], position: int, slots: int, running: int, waited_s: float
) -> None:
    found = eta(at(position, slots=slots, running=running, waited_s=waited_s), times(*durations_s))

    assert 0.0 <= found.p50_s <= found.p90_s < math.inf


@given(durations, st.integers(1, 500), st.integers(1, 32))
def test_further_back_in_line_is_never_sooner(durations_s: list[float], position: int, slots: int) -> None:
    served = times(*durations_s)
    nearer, further = (eta(at(place, slots=slots, running=slots), served) for place in (position, position + 1))

    assert nearer.p50_s <= further.p50_s * (1 + 1e-9)
    assert nearer.p90_s <= further.p90_s * (1 + 1e-9)
