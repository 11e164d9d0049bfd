"""Runs that do not stop although they have to: their attempts end without them, and the device by force if need be."""

import logging
import threading
from collections.abc import Callable

from workers.attempts.runs import Run
from workers.host import DeviceHost, InterruptReason, RunInterrupted

logger = logging.getLogger(__name__)


class DeafRuns:
    """Ends what does not listen. Safe to share between threads.

    A run that has held the device for half of `patience_s` and more is ended by force, with its neighbours. Where the
    host cannot do that, `on_stuck` is told: from then on the device cannot be trusted.
    """

    def __init__(self, host: DeviceHost, *, patience_s: float, on_stuck: Callable[[str], None]) -> None:
        self._host = host
        self._patience_s = patience_s
        self._on_stuck = on_stuck
        self._guard = threading.Lock()
        self._left: list[threading.Timer] = []  # one for each run that was left, until it ends or its time is over

    def abandon(self, run: Run) -> RunInterrupted:
        """Settle the run without it: its outcome."""
        reason = run.interrupted_by() or InterruptReason.TIMEOUT
        stuck_for_s = self._host.health().stuck_for_s or 0.0
        told = f"Job {run.lease.job_id} did not stop ({reason})."
        wanted_no_more = reason in {InterruptReason.GIVE_BACK, InterruptReason.CANCEL}
        if wanted_no_more and stuck_for_s < self._patience_s / 2:
            # Its thread is busy outside the device, most likely with the loading of a model.
            logger.warning("Job %s is left (%s) while its run goes on; the device is free.", run.lease.job_id, reason)
            if reason is InterruptReason.CANCEL:
                self._end_in_time(run, told)
        else:
            self._end_by_force(f"{told} The device call in hand has lasted {stuck_for_s:.0f} s.")
        # A cancelled run that never came back has in truth outlived its limit, but its caller gets what he asked for.
        return RunInterrupted(reason)

    def close(self) -> None:
        """Wait for none of them any longer. Idempotent."""
        with self._guard:
            left, self._left = self._left, []
        for last in left:
            last.cancel()

    def _end_in_time(self, run: Run, told: str) -> None:
        """A run that is left keeps its thread and its model: not for longer than any run may."""
        last = threading.Timer(run.left_s, lambda: self._end_by_force(told) if run.on_device else None)
        last.name, last.daemon = f"left-{run.lease.job_id[:8]}", True
        last.start()
        with self._guard:
            self._left = [timer for timer in self._left if timer.is_alive()] + [last]
        run.once_off_device(last.cancel)

    def _end_by_force(self, why: str) -> None:
        if not self._host.end_by_force(why):
            self._on_stuck(why)
