"""A run: one attempt of one job while this process works on it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.errors import JobTimeout
from omnirt_tasks.jobs.values import Claim
from workers.attempts.gate import Place
from workers.host import InterruptReason, RunOutcome


@dataclass(frozen=True)
class TimeLimit:
    """How long a run may last; `deadline_s` is its job's own, where that is what ends it."""

    seconds: float
    deadline_s: float | None = None

    @classmethod
    def of(cls, claim: Claim, job_timeout_s: float) -> "TimeLimit":
        """The limit of an attempt, or what its job's deadline leaves of it."""
        if claim.remaining_ms is None or claim.remaining_ms >= job_timeout_s * 1000:
            return cls(job_timeout_s)
        return cls(max(claim.remaining_ms, 0) / 1000, claim.job.resolved.deadline_s)

    def error(self) -> ErrorInfo:
        """What the caller is told of a job that met it."""
        if self.deadline_s is None:
            return JobTimeout(f"The job ran longer than the limit of {self.seconds:g} s.", "Ask for less work.").info()
        message = f"The job was not over {self.deadline_s:g} s after it was accepted, its deadline_s."
        return JobTimeout(message, "Give it more time, or ask for less work.").info()


@dataclass(frozen=True)
class MadeCheckpoint:
    """A file that the device side has left: the run's state after `step`."""

    step: int
    file: Path


class Run:
    """What the threads around one attempt tell each other. Safe to share between them.

    It may last as long as `limit` says, and is waited for `patience_s` longer to end at its next device call. One that
    is given back is waited for `patience_s` only, and one that is cancelled for `stop_patience_s` (None: as long as
    any). `place` is its place on the device.
    """

    def __init__(
        self,
        claim: Claim,
        place: Place,
        *,
        limit: TimeLimit,
        patience_s: float,
        stop_patience_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease = claim.lease
        self.job = claim.job
        self.place = place
        self.limit = limit
        self.checkpoint = claim.job.checkpoint  # the newest that is kept of the job; for its run's thread alone
        # Whether files of the attempt lie in the storage, outputs or checkpoints; for its run's thread alone.
        self.published = self.kept_checkpoints = False
        self._deadline_s = clock() + limit.seconds
        self._patience_s = patience_s
        self._stop_patience_s = stop_patience_s
        self._clock = clock
        self._changed = threading.Event()
        self._guard = threading.Lock()
        self._reason: InterruptReason | None = None
        self._abandon_at_s = self._deadline_s + patience_s
        self._made: MadeCheckpoint | None = None
        self._outcome: Future[RunOutcome] | None = None

    @property
    def job_id(self) -> str:
        """The id by which a client knows the job: of the whole one, where it is a part."""
        return self.lease.job_id if self.job.part is None else self.job.part.job_id

    def begun(self, outcome: "Future[RunOutcome]") -> None:
        """The device has it; its end wakes `wait`."""
        self._outcome = outcome
        outcome.add_done_callback(lambda _: self._changed.set())

    @property
    def on_device(self) -> bool:
        """Whether the device has it still, if only because it was left there."""
        return self._outcome is not None and not self._outcome.done()

    def once_off_device(self, call: Callable[[], object]) -> None:
        """Call once the device has it no more: now, unless it was left there."""
        if self._outcome is None:
            call()
        else:
            self._outcome.add_done_callback(lambda _: call())

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

    def offer(self, made: MadeCheckpoint) -> None:
        """A checkpoint to be kept; one that still waits for that is of no use any more. Never blocks on anything."""
        with self._guard:
            outdated, self._made = self._made, made
        if outdated is not None:
            outdated.file.unlink(missing_ok=True)
        self._changed.set()

    def take_checkpoint(self) -> MadeCheckpoint | None:
        """The newest checkpoint that was offered and not taken."""
        with self._guard:
            made, self._made = self._made, None
        return made

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

    def wake(self) -> None:
        """Let `wait` return."""
        self._changed.set()

    def wait(self) -> None:
        """Return when something changed, or when `overdue` or `abandoned` may have become true."""
        until_s = self._deadline_s if self._reason is None else self._abandon_at_s
        self._changed.wait(max(until_s - self._clock(), 0.001))
        self._changed.clear()
