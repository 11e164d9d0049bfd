"""A run: one attempt of one job while this process works on it."""

import threading
import time
from collections.abc import Callable

from omnirt_tasks.jobs.store import Lease, StoredJob
from workers.host import InterruptReason


class Run:
    """What the threads around one attempt tell each other. Safe to share between them.

    It may last `timeout_s`, and is waited for `patience_s` longer to end at its next device call. One that is given
    back is waited for `patience_s` only, and one that is cancelled for `stop_patience_s` (None: as long as any).
    """

    def __init__(
        self,
        lease: Lease,
        job: StoredJob,
        *,
        timeout_s: float,
        patience_s: float,
        stop_patience_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease = lease
        self.job = job
        self._deadline_s = clock() + timeout_s
        self._patience_s = patience_s
        self._stop_patience_s = stop_patience_s
        self._clock = clock
        self._changed = threading.Event()
        self._guard = threading.Lock()
        self._reason: InterruptReason | None = None
        self._abandon_at_s = self._deadline_s + patience_s

    def interrupted_by(self) -> InterruptReason | None:
        """Why it is to stop; None while it is not."""
        return self._reason

    def interrupt(self, reason: InterruptReason) -> bool:
        """Note that it is to stop; false if that was known. The first reason stays."""
        with self._guard:
            first = self._reason is None
            if first:
                self._reason = reason
            if reason is InterruptReason.GIVE_BACK:  # the worker leaves: no run is waited for any longer
                self._abandon_at_s = min(self._abandon_at_s, self._clock() + self._patience_s)
            elif first and reason is InterruptReason.CANCEL and self._stop_patience_s is not None:
                self._abandon_at_s = min(self._abandon_at_s, self._clock() + self._stop_patience_s)
        self._changed.set()
        return first

    @property
    def overdue(self) -> bool:
        """Whether it has lasted too long."""
        return self._clock() >= self._deadline_s

    @property
    def left_s(self) -> float:
        """How long until it has lasted too long."""
        return max(self._deadline_s - self._clock(), 0.0)

    @property
    def abandoned(self) -> bool:
        """Whether it did not stop although it had to: its device call does not come back."""
        return self._clock() >= self._abandon_at_s

    def wake(self, *_: object) -> None:
        """Let `wait` return."""
        self._changed.set()

    def wait(self) -> None:
        """Return when something changed, or when `overdue` or `abandoned` may have become true."""
        until_s = self._deadline_s if self._reason is None else self._abandon_at_s
        self._changed.wait(max(until_s - self._clock(), 0.001))
        self._changed.clear()
