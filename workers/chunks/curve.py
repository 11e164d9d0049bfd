"""How long the calls of one kind take by their number of rows, and how many rows pay: measured call by call.

throughput                 o   o        what counts of a size is the median of its newest calls; between two sizes
              o     o                   that count, time is a straight line
        o                               the best size: that of the highest throughput, 5 % taken off for each
  o                                     member, so that another one is taken as long as it brings more than that
  └─────┴─────┴─────┴────── rows
"""

import math
import statistics
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Another member must raise throughput by so much; below, it only makes each of them slower.
GAIN_MIN = 1.05
# The newest calls of a size, whose median counts.
WINDOW = 15
# The newest calls of any size, which tell how well the limit is used.
NEWEST = 64
# Calls of a size before it counts: the first ones also choose kernels and take memory.
CALLS_MIN = 3
# Calls of a size before it may be given up; until then a busy moment of the machine may be what made it slow.
CALLS_SURE = 9
# After so many calls one is larger than what pays, and after as many again one is smaller: devices and who else uses
# them change, and between the sizes that were measured there may be a better one.
TRIAL_EVERY = 128
# After so long a size that was too large for the device's memory is approached again.
TOO_LARGE_FOR_S = 3600.0
# No larger call is measured. Even rows that cost nothing stop to pay at 20, or 20 members of as many rows.
ROWS_MAX = 64
# A clock that stands still measures nothing.
ELAPSED_MIN_S = 1e-6


@dataclass(frozen=True)
class TooLarge:
    """Calls of `rows` did not fit into the device's memory; those of `fits` are taken for sure."""

    rows: int
    fits: int


@dataclass(frozen=True)
class Best:
    """The number of rows that pays, and how much more is done per second with it than with the smallest calls."""

    rows: int
    gain: float


class Curve:
    """What is known of one kind of call. Not safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing; `clock` tells seconds."""
        self._clock = clock
        self._calls_s: dict[int, deque[float]] = {}
        self._median_s: dict[int, float] = {}
        self._newest_rows: deque[int] = deque(maxlen=NEWEST)
        self._since_trial = 0  # calls since one was larger or smaller than what pays, on trial
        self._larger_next = True
        self._too_large: TooLarge | None = None
        self._too_large_at_s = 0.0
        self._best: Best | None = None  # None: to be found anew

    def note(self, rows: int, elapsed_s: float) -> None:
        """A call of so many rows took so long; of more than ROWS_MAX nothing is kept."""
        if rows > ROWS_MAX or not math.isfinite(elapsed_s):
            return
        self._note_trial(rows)
        self._newest_rows.append(rows)
        calls = self._calls_s.setdefault(rows, deque(maxlen=WINDOW))
        calls.append(max(elapsed_s, ELAPSED_MIN_S))
        self._median_s[rows] = statistics.median(calls)
        self._best = None
        self._note_fitting(rows)

    def note_too_large(self, rows: int) -> None:
        """The device had too little memory for a call of so many rows."""
        known = self._too_large
        # What was approached again and did not fit says nothing against what did.
        fits = known.fits if known is not None and rows > known.fits else max(rows // 2, 1)
        self._too_large, self._too_large_at_s = TooLarge(rows, fits), self._clock()

    def rows_max(self) -> int:
        """The most rows of the next call: at most twice what was measured, and 1 as long as nothing counts."""
        best = self.best()
        if best is None:
            return 1
        sizes = self._counting()
        if (trial := self._trial(best.rows)) is not None:
            rows = trial
        elif best.rows == sizes[-1]:
            rows = 2 * best.rows
        else:
            rows = max(best.rows, *(size for size in sizes if len(self._calls_s[size]) < CALLS_SURE), 0)
        return min(rows, self._fitting(), ROWS_MAX)

    def expected_s(self, rows: int) -> float | None:
        """How long a call of so many rows takes; beyond what was measured as if all rows took equally long."""
        if not self._median_s:
            return None
        sizes = sorted(self._median_s)
        if rows > sizes[-1]:
            return self._median_s[sizes[-1]] * rows / sizes[-1]
        return self._between(sizes, rows)

    def best(self) -> Best | None:
        """What pays, among the sizes that count and those between them; None as long as none does."""
        if self._best is None and (sizes := self._counting()):
            self._best = self._find_best(sizes)
        return self._best

    @property
    def medians_s(self) -> Mapping[int, float]:
        """The median time of a call by rows, for the sizes that count, in order."""
        return {rows: self._median_s[rows] for rows in self._counting()}

    @property
    def fill(self) -> float | None:
        """How much of what pays the newest calls used; None as long as there are none."""
        if not self._newest_rows or (best := self.best()) is None:
            return None
        return statistics.fmean(self._newest_rows) / best.rows

    @property
    def calls_s(self) -> Mapping[int, Sequence[float]]:
        """The newest calls of each size, oldest first."""
        return {rows: tuple(calls) for rows, calls in sorted(self._calls_s.items())}

    @property
    def too_large(self) -> TooLarge | None:
        """What did not fit, unless it was seen to since."""
        return self._too_large

    def restore(self, calls_s: Mapping[int, Sequence[float]], too_large: TooLarge | None) -> None:
        """Take over what another curve knew."""
        for rows, calls in calls_s.items():
            if calls and rows <= ROWS_MAX:
                self._calls_s[rows] = deque(calls, maxlen=WINDOW)
                self._median_s[rows] = statistics.median(self._calls_s[rows])
        self._best = None
        self._too_large, self._too_large_at_s = too_large, self._clock()

    def _trial(self, best: int) -> int | None:
        """What the next call is to have, if one is due that has not what pays: halfway to the next size that counts."""
        if self._since_trial < TRIAL_EVERY:
            return None
        sizes = self._counting()
        smallest, below, above = sizes[0], bisect_left(sizes, best) - 1, bisect_right(sizes, best)
        larger = smaller = None
        if above < len(sizes):  # else calls grow without a trial
            larger = best + max((sizes[above] - best) // 2 // smallest, 1) * smallest
            larger = larger if larger <= self._fitting() else None
        if below >= 0:
            smaller = best - max((best - sizes[below]) // 2 // smallest, 1) * smallest
        first, second = (larger, smaller) if self._larger_next else (smaller, larger)
        return second if first is None else first

    def _note_trial(self, rows: int) -> None:
        self._since_trial += 1
        if (best := self.best()) is None or (trial := self._trial(best.rows)) is None:
            return
        if rows > best.rows if trial > best.rows else rows < best.rows:
            self._since_trial = 0
            self._larger_next = trial < best.rows

    def _counting(self) -> list[int]:
        return sorted(rows for rows, calls in self._calls_s.items() if len(calls) >= CALLS_MIN)

    def _find_best(self, sizes: Sequence[int]) -> Best:
        smallest = sizes[0]  # what one member brings

        def worth(rows: int) -> float:
            return math.log(rows / self._between(sizes, rows)) - rows / smallest * math.log(GAIN_MIN)

        rows = max(sorted({*sizes, *range(smallest, sizes[-1], smallest)}), key=worth)
        return Best(rows, rows / self._between(sizes, rows) * self._median_s[smallest] / smallest)

    def _between(self, sizes: Sequence[int], rows: int) -> float:
        """The time at `rows`, at most the largest of the sizes; below the smallest, that of the smallest."""
        after = bisect_left(sizes, rows)
        upper = sizes[after]
        if after == 0 or upper == rows:
            return self._median_s[upper]
        lower = sizes[after - 1]
        share = (rows - lower) / (upper - lower)
        return self._median_s[lower] * (1 - share) + self._median_s[upper] * share

    def _fitting(self) -> int:
        """The most rows that fit into memory as far as is known; halfway to what did not, when that is long ago."""
        if (known := self._too_large) is None:
            return ROWS_MAX
        if self._clock() - self._too_large_at_s < TOO_LARGE_FOR_S:
            return known.fits
        return (known.fits + known.rows + 1) // 2

    def _note_fitting(self, rows: int) -> None:
        known = self._too_large
        if known is None or rows <= known.fits:
            return
        self._too_large_at_s = self._clock()
        self._too_large = None if rows >= known.rows else TooLarge(known.rows, rows)
