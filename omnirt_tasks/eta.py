"""When a waiting job will be done, told from how long such jobs took lately.

The model: the workers of a queue run its jobs in so many slots, all of them busy while a job waits, and the first in
line takes whichever gets free. Service times are alike and independent, drawn from those that the queue's jobs took
lately, of whatever kind. So within t seconds slots · t / mean of them end, give or take what the spread of the service
times, and not knowing when each began, make of that; and the job that is k-th in line begins when k have ended. Its own
service time follows: one of its own kind, as far as such were measured.

What it does not know: which kinds stand in line before the job, what will overtake it, and that jobs which share their
forward passes slow each other down, other than those did that were measured.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pvariance

from omnirt_tasks.jobs.values import ServiceTime

SETTLED_S = 2.0
"""A job that has waited for so long though slots are free shows that they cannot be used."""
KIND_TIMES_MIN = 10
"""From so many service times on, those of a kind speak for themselves."""
VALUES = 12
"""How many values of equal weight stand for a distribution."""
NORMAL = tuple(NormalDist().inv_cdf((number + 0.5) / VALUES) for number in range(VALUES))
PHASE_VARIANCE = 1 / 6
"""What not knowing when the job in a slot began adds to the variance of how many end there."""


@dataclass(frozen=True)
class Line:
    """The line that a job stands in: its `position` (from 1), and how long it has waited.

    `slots` is how many jobs the live workers of the queue run at once, `running` how many jobs of the queue run now.
    """

    position: int
    waited_s: float
    slots: int
    running: int


@dataclass(frozen=True)
class Eta:
    """In how many seconds a job will be done: in half of all cases, and in nine of ten."""

    p50_s: float
    p90_s: float


class Served:
    """What the newest service times of a queue tell: made once, and asked for many jobs. Never changes."""

    def __init__(self, times: Sequence[ServiceTime]) -> None:
        by_kind: defaultdict[str, list[float]] = defaultdict(list)
        for time in times:
            by_kind[time.kind].append(time.duration_ms / 1000)
        all_s = [each_s for of_kind_s in by_kind.values() for each_s in of_kind_s]
        self._count = len(all_s)
        self._mean_s = fmean(all_s) if all_s else 0.0
        self._variance = pvariance(all_s) / self._mean_s**2 if self._mean_s else 0.0  # of what is a share of the mean
        self._all_s = _thinned(all_s)
        self._by_kind_s = _by_kind(by_kind)

    def eta(self, line: Line, kind: str) -> Eta | None:
        """When a job of this kind will be done; None if nothing tells."""
        if line.slots < 1 or not self._count:
            return None
        waits_s, own_times_s = self._waits_s(line), self._by_kind_s.get(kind, self._all_s)
        ends_s = sorted(wait_s + own_s for wait_s in waits_s for own_s in own_times_s)
        return Eta(p50_s=_quantile(ends_s, 0.5), p90_s=_quantile(ends_s, 0.9))

    def _waits_s(self, line: Line) -> Sequence[float]:
        """How long it may be until the job begins, in values of equal weight."""
        slots = line.slots
        if line.running < slots and line.waited_s >= SETTLED_S:
            slots = max(line.running, 1)
        to_end = line.position - max(slots - line.running, 0)
        if to_end < 1:
            return (0.0,)
        each = to_end / slots  # how many end in each slot before the job begins
        ending = slots * (each * self._variance + min(each, PHASE_VARIANCE))  # the variance of how many end by then
        unsure = to_end**2 * self._variance / self._count  # what the mean itself may be wrong by
        spread = math.sqrt(ending + unsure)
        return [max(0.0, to_end - 0.5 + value * spread) * self._mean_s / slots for value in NORMAL]


def _by_kind(served_s: Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
    """How long a job of each kind takes, in at most VALUES values of equal weight.

    A kind of which little is known spreads around its mean as the others do around theirs.
    """
    means_s = {kind: fmean(of_kind_s) for kind, of_kind_s in served_s.items()}
    shares = [
        each_s / means_s[kind]
        for kind, of_kind_s in served_s.items()
        if len(of_kind_s) > 1 and means_s[kind]
        for each_s in of_kind_s
    ]
    spread = _thinned(shares or [1.0])
    return {
        kind: _thinned(of_kind_s) if len(of_kind_s) >= KIND_TIMES_MIN else [means_s[kind] * share for share in spread]
        for kind, of_kind_s in served_s.items()
    }


def _thinned(values: Sequence[float]) -> Sequence[float]:
    """Values in order, and at most VALUES of them that stand for all."""
    ordered = sorted(values)
    if len(ordered) <= VALUES:
        return ordered
    return [_quantile(ordered, (number + 0.5) / VALUES) for number in range(VALUES)]


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which that share of the ordered values lies, between two of them where need be."""
    place = min(max(share * len(ordered) - 0.5, 0.0), len(ordered) - 1.0)
    lower = int(place)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (place - lower)
