"""How a job comes to its attempt: its turn at the gate, and the claim, alone where the store asks for that."""

import contextlib
import secrets
import threading
from collections.abc import Callable, Collection

from omnirt_tasks.contract import ExecutionMode, JobState
from omnirt_tasks.errors import JobNotFound, JobTimeout, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Claim, MustRunAlone, Requeue, StoredJob
from workers.attempts.endings import LEAVING, NO_ROOM, AttemptEnd
from workers.attempts.gate import Gate, Place
from workers.attempts.patience import Patience

LOOK_EVERY_S = 1.0
"""How often a job that waits at the gate is looked at: another worker may have taken it."""


class _NotHere(Exception):  # no error: it is answered within this module
    """The job is not to begin here; `requeue` says how it goes back (None: it is to be dropped)."""

    def __init__(self, requeue: Requeue | None) -> None:
        super().__init__(requeue)
        self.requeue = requeue


class Claiming:
    """Claims jobs for one worker, as its gate allows. Safe to share between threads.

    A job that would wait behind another that cannot begin goes back unclaimed, if `serves_elsewhere` says that another
    worker could have it. Once `leaving` is set none is claimed.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        gate: Gate,
        patiently: Patience,
        leaving: threading.Event,
        serves_elsewhere: Callable[[StoredJob], bool],
        worker_id: str,
        lease_ttl_s: float,
        queues: Collection[str] | None,
        execution_mode: ExecutionMode | None,
    ) -> None:
        self._store = store
        self._gate = gate
        self._patiently = patiently
        self._leaving = leaving
        self._serves_elsewhere = serves_elsewhere
        self._worker_id = worker_id
        self._lease_ttl_ms = round(lease_ttl_s * 1000)
        self._queues = queues
        self._execution_mode = execution_mode

    def claim(self, job_id: str, place: Place) -> Claim | Requeue | None:
        """The claim, with its place inside the gate; or how the job goes back; or None, for a message to be dropped.

        Raises StoreUnavailable past all patience.
        """
        try:
            self._enter(place, job_id)
            claim = self._claim(job_id)
            if not isinstance(claim, MustRunAlone):
                self._gate.settle(place)
                return claim
            if not claim.awaited:
                self._enter_alone(place, job_id)
            elif not self._gate.enter(place, alone=True, timeout_s=0.0):
                return None  # the worker that waits for it has it, unless it can begin here at once
        except _NotHere as refused:
            return refused.requeue
        claim = self._claim(job_id, alone=True)
        assert not isinstance(claim, MustRunAlone), "a claim that promises to be alone is not told to be"
        return claim

    def not_begun(self, job_id: str, requeue: Requeue | None) -> AttemptEnd | None:
        """The end of a message whose job was not claimed; None where there is nothing to tell of it.

        Raises StoreUnavailable past all patience.
        """
        try:
            job = self._patiently(lambda: self._store.get(job_id), "read")
        except JobNotFound:
            return None
        record = job.record
        if requeue is not None and record.state is JobState.QUEUED:
            return AttemptEnd(job, requeue)
        too_late = record.error is not None and record.error.code == JobTimeout.code
        return AttemptEnd(job) if record.state is JobState.CANCELLED or too_late else None

    def _enter(self, place: Place, job_id: str) -> None:
        """Wait for the job's turn; unclaimed, so that another worker may take it first. Raises _NotHere."""
        goes_back = True
        while not self._leaving.is_set():
            if self._gate.enter(place, alone=False, timeout_s=LOOK_EVERY_S, unless_held_up=goes_back):
                return self._require_to_stay()
            goes_back = False
            with contextlib.suppress(StoreUnavailable):
                if (job := self._queued(job_id)) is None:
                    raise _NotHere(None)
                if self._gate.held_up(place) and self._serves_elsewhere(job):
                    raise _NotHere(NO_ROOM)
        raise _NotHere(LEAVING)

    def _enter_alone(self, place: Place, job_id: str) -> None:
        """Wait until the others have left; other workers count on that. Raises _NotHere."""
        while not self._leaving.is_set():
            if self._gate.enter(place, alone=True, timeout_s=LOOK_EVERY_S):
                return self._require_to_stay()
            with contextlib.suppress(StoreUnavailable):
                if not self._is_awaited_here(job_id):
                    raise _NotHere(None)
        raise _NotHere(LEAVING)

    def _require_to_stay(self) -> None:
        if self._leaving.is_set():  # its turn may have come because the others left
            raise _NotHere(LEAVING)

    def _claim(self, job_id: str, *, alone: bool = False) -> Claim | MustRunAlone | None:
        token = secrets.token_hex(16)  # one for all tries: what was won is ours, though the answer be lost
        return self._patiently(lambda: self._try_claim(job_id, token, alone=alone), "claimed")

    def _queued(self, job_id: str) -> StoredJob | None:
        try:
            job = self._store.get(job_id)
        except JobNotFound:
            return None
        return job if job.record.state is JobState.QUEUED else None

    def _is_awaited_here(self, job_id: str) -> bool:
        """Whether the job still waits for this device, which says so by asking."""
        answer = self._try_claim(job_id, secrets.token_hex(16), alone=False)
        return isinstance(answer, MustRunAlone) and not answer.awaited

    def _try_claim(self, job_id: str, token: str, *, alone: bool) -> Claim | MustRunAlone | None:
        return self._store.claim(
            job_id,
            worker_id=self._worker_id,
            lease_ttl_ms=self._lease_ttl_ms,
            execution_mode=self._execution_mode,
            alone=alone,
            queues=self._queues,
            token=token,
        )
