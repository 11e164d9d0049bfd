"""Pace: how long a unit of work takes on this device, by model, as measured."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What the newest run weighs in the average: a change of pace shows within some ten runs, one odd run hardly does.
NEWEST_WEIGHS = 0.2


class Pace:
    """A moving average of seconds per unit for each model, over the runs that came to an end.

    Runs at the same time share the device: each is counted its part of every moment, so that eight at once do not
    look eight times as slow. Safe to share between threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards all below
        self._running = 0
        self._share_s = 0.0  # what one run that had been there from the start would have been counted
        self._since_s = clock()
        self._seconds_per_unit: dict[str, float] = {}

    @contextmanager
    def measured(self, model: str, units: float | None) -> Iterator[None]:
        """A run of so many units while inside; one without units takes its share of the time, and tells nothing."""
        began_s = self._moved_on(+1)
        try:
            yield
        except BaseException:
            self._moved_on(-1)
            raise
        share_s = self._moved_on(-1) - began_s
        if units:
            with self._lock:
                measured = share_s / units
                before = self._seconds_per_unit.get(model, measured)
                self._seconds_per_unit[model] = before + NEWEST_WEIGHS * (measured - before)

    def seconds_per_unit(self, model: str) -> float | None:
        """The average; None until a run with units has come to its end."""
        with self._lock:
            return self._seconds_per_unit.get(model)

    def _moved_on(self, more: int) -> float:
        with self._lock:
            now_s = self._clock()
            if self._running:
                self._share_s += (now_s - self._since_s) / self._running
            self._since_s = now_s
            self._running += more
            return self._share_s
