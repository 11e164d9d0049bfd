"""How an attempt ends: what its outcome means for the job, written to the store, and the files that go with it.

RunOutcome ─► commit (a result, an error, a cancel) │ back to its queue │ nothing, the lease is lost
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import TERMINAL_STATES, ErrorInfo, JobState
from omnirt_tasks.errors import Internal, JobNotFound, OmnirtError, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Cancelled, Failed, Origin, Outcome, Requeue, StoredJob, Succeeded
from workers.attempts.event_flusher import EventBuffer
from workers.attempts.patience import Patience
from workers.attempts.report import describe_outputs, make_result, own_events
from workers.attempts.retries import Failure, RetryPolicy, requeue_after
from workers.attempts.runs import Run
from workers.disk import full_disk
from workers.host import InterruptReason, RunFailed, RunInterrupted, RunLost, RunOutcome, RunSucceeded

logger = logging.getLogger(__name__)

LEAVING = Requeue("worker_leaving")
NO_ROOM = Requeue("no_room")
DEVICE_LOST = Requeue("device_lost", died=True)
DRAIN_TRY_S = 5.0

# The path and the URL of an output, by the job as a client knows it, where the file lies, and its name.
Address = Callable[[str, Origin, str], tuple[str, str | None]]


@dataclass(frozen=True)
class AttemptEnd:
    """The job as an attempt left it: over, running elsewhere under a newer lease, or back in its queue.

    `requeue` says how it went back; None where it did not, or not by this attempt. `whole` is the job that this one is
    a part of, once that is over.
    """

    job: StoredJob
    requeue: Requeue | None = None
    whole: StoredJob | None = None

    @property
    def to_send(self) -> bool:
        """Whether its message is to be sent again now; where it waits for a retry, the reconciler does that."""
        waits = self.requeue is not None and self.requeue.delay_ms > 0
        return self.job.record.state is JobState.QUEUED and not waits


class Endings:
    """Ends attempts. Safe to share between threads.

    `serves_elsewhere` tells whether another live worker could run the job. `address` tells where an output will be.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        artifacts: ArtifactStorage,
        patiently: Patience,
        policy: RetryPolicy,
        serves_elsewhere: Callable[[StoredJob], bool],
        address: Address,
        worker_id: str,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._patiently = patiently
        self._policy = policy
        self._serves_elsewhere = serves_elsewhere
        self._address = address
        self._worker_id = worker_id

    def end(self, run: Run, outcome: RunOutcome, outputs: Path, buffer: EventBuffer) -> AttemptEnd | None:
        """Do what the outcome asks for; None when the job was purged. Raises StoreUnavailable past all patience."""
        match outcome:
            case RunSucceeded():
                return self._succeed(run, outcome, outputs, buffer)
            case RunFailed(error):
                return self.fail(run, error, buffer)
            case RunInterrupted(reason) if reason is not InterruptReason.GIVE_BACK:
                return self._stop(run, reason, buffer)
            case RunInterrupted():  # nobody asked for it, unless the worker leaves: then the host let go by itself
                return self._lose(run, "The device was let go.", buffer)
            case RunLost(detail):
                return self._lose(run, detail, buffer)

    def fail(self, run: Run, error: ErrorInfo, buffer: EventBuffer) -> AttemptEnd | None:
        """End an attempt that met the error: the job has failed, or is tried again where that may help."""
        failure = Failure(
            error=error,
            retries=run.job.retries,
            accompanied=run.place.accompanied,
            elsewhere=self._serves_elsewhere(run.job),
            part_unproven=run.job.part is not None and not run.place.alone,
        )
        requeue = requeue_after(failure, self._policy)
        if requeue is None:
            return self._settle(run, buffer, lambda: Failed(error))
        end = self._give_back(run, buffer, requeue)
        if end is not None and end.job.record.state is JobState.QUEUED:  # not one that was over meanwhile
            how = "alone" if requeue.alone else f"in {requeue.delay_ms / 1000:g} s"
            logger.warning("Job %s is tried again %s: %s: %s", run.lease.job_id, how, error.code, error.message)
        return end

    def _lose(self, run: Run, detail: str, buffer: EventBuffer) -> AttemptEnd | None:
        if (wanted := run.interrupted_by()) is not None:  # it was to end in any case
            return self._stop(run, wanted, buffer)
        logger.warning("Job %s lost what ran it: %s", run.lease.job_id, detail)
        return self._give_back(run, buffer, DEVICE_LOST)

    def _stop(self, run: Run, reason: InterruptReason, buffer: EventBuffer) -> AttemptEnd | None:
        match reason:
            case InterruptReason.LEASE_LOST:
                return self._ended(run, self._now(run))  # another attempt has the job: nothing of this one counts
            case InterruptReason.GIVE_BACK:
                logger.info("Job %s goes back to its queue, since this worker leaves.", run.lease.job_id)
                return self._give_back(run, buffer, LEAVING)
            case InterruptReason.NO_ROOM:
                logger.info("Job %s goes back to its queue: another one waits here already.", run.lease.job_id)
                return self._give_back(run, buffer, NO_ROOM)
            case InterruptReason.TIMEOUT:
                return self._settle(run, buffer, lambda: Failed(run.limit.error()))
            case InterruptReason.CANCEL:
                return self._settle(run, buffer, Cancelled)

    def _succeed(self, run: Run, done: RunSucceeded, outputs: Path, buffer: EventBuffer) -> AttemptEnd | None:
        lease = run.lease
        origin = Origin(lease.job_id, lease.attempt)
        try:
            artifacts = describe_outputs(done.outputs, outputs, lambda name: self._address(run.job_id, origin, name))
            run.published = True
            self._artifacts.publish(lease.job_id, lease.attempt, [outputs / output.name for output in done.outputs])
        except OmnirtError as error:
            logger.warning("The outputs of job %s cannot be kept: %s", lease.job_id, error, exc_info=error)
            return self.fail(run, error.info(), buffer)

        def outcome() -> Outcome:
            log = own_events(run.job, self._store.events(run.job_id, after=run.job.last_seq))
            return Succeeded(make_result(lease, run.job, done.facts, artifacts, log, self._worker_id))

        return self._settle(run, buffer, outcome)

    def _settle(self, run: Run, buffer: EventBuffer, outcome: Callable[[], Outcome]) -> AttemptEnd | None:
        """Commit, once what the run told is in the log.

        A refusal is no error: the job may have been committed by a try whose answer was lost, or belong to another
        attempt by now. The record tells.
        """

        def commit() -> StoredJob | None:
            if not buffer.drain(DRAIN_TRY_S):
                raise StoreUnavailable("The events of the job cannot be written.")
            with contextlib.suppress(JobNotFound):
                self._store.commit(run.lease, outcome())
                return self._store.get(run.lease.job_id)
            return None

        return self._ended(run, self._patiently(commit, "committed"))

    def _give_back(self, run: Run, buffer: EventBuffer, requeue: Requeue) -> AttemptEnd | None:
        def give_back() -> StoredJob | None:
            buffer.drain(DRAIN_TRY_S)
            with contextlib.suppress(JobNotFound):
                self._store.give_back(run.lease, requeue)
                return self._store.get(run.lease.job_id)
            return None

        return self._ended(run, self._patiently(give_back, "given back"), requeue)

    def with_whole(self, end: AttemptEnd | None) -> AttemptEnd | None:
        """The end with the job that it was a part of, if that is over: of one without a result the files go."""
        whole = None if end is None else self._whole(end.job)
        if end is None or whole is None:
            return end
        if whole.record.state is not JobState.SUCCEEDED:
            for part in whole.parts:
                self._keep_only(part, None)
        return replace(end, whole=whole)

    def _ended(self, run: Run, job: StoredJob | None, requeue: Requeue | None = None) -> AttemptEnd | None:
        self._tidy(run, job)
        return self.with_whole(None if job is None else AttemptEnd(job, requeue))

    def _tidy(self, run: Run, job: StoredJob | None) -> None:
        """Of a job that is over, only the files of the committed attempt stay; of one that is not, all that may count.

        Whoever sees last that the job is over removes what lies there, so a late attempt leaves nothing. What a part
        has made stays until the whole is over.
        """
        if job is not None and job.record.state not in TERMINAL_STATES:
            return
        committed = job.record.attempt if job is not None and job.record.state is JobState.SUCCEEDED else None
        if run.lease.attempt == 1 and not run.kept_checkpoints and (committed == 1 or not run.published):
            return  # nothing else can lie there
        self._keep_only(run.lease.job_id, committed)

    def _keep_only(self, job_id: str, attempt: int | None) -> None:
        try:
            self._artifacts.keep_only(job_id, attempt)
        except OmnirtError as error:
            logger.warning("Files of job %s stay behind for the sweep: %s", job_id, error)

    def _whole(self, job: StoredJob) -> StoredJob | None:
        """The job of a part, once it is over; None, too, where it cannot be read: this end stands all the same."""
        part = job.part
        if part is None or job.record.state not in TERMINAL_STATES:
            return None
        try:
            whole = self._patiently(lambda: self._store.get(part.job_id), "read")
        except (JobNotFound, StoreUnavailable):
            return None
        return whole if whole.record.state in TERMINAL_STATES else None

    def _now(self, run: Run) -> StoredJob | None:
        try:
            return self._patiently(lambda: self._store.get(run.lease.job_id), "read")
        except JobNotFound:
            return None


def fault(error: Exception) -> ErrorInfo:
    """What a job is told of an error in the worker's own work."""
    ours = Internal("The job failed for a reason that lies with the server.", "Try again; the log has the reason.")
    return (full_disk(error) or ours).info()
