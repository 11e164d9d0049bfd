"""What a job store promises; `memory` and `redis` keep it, and one test body runs against both.

    create ─► claim ─► append… ─► commit            the straight way
                │ ▲       │
                │ └─ give_back / reconcile           an attempt is over, the job is not
      cancel ───┴─► (queued: at once; running: a flag that the holder sees)

An attempt that died (its worker or device did) makes its job one that runs alone from then on: of jobs that died
together nobody knows which is to blame. A death while alone counts, and at `deaths_max` of them the job has failed.

A job may be split into parts, which run as jobs of their own: claimed, leased, committed, retried and blamed each for
itself, by whatever workers. The job's record follows them: it runs once the first part does, its log and its progress
are those of all, and it ends with the last part that succeeds, with the first that fails for good, or with its cancel,
once no part runs. Then no part of it waits or is claimed any more. No client sees a part by itself.

Every change of state goes through one atomic step that checks the state it starts from, writes the record and
appends the event that tells of it. An attempt is known by its `Lease`: whoever holds an older one changes nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from omnirt_tasks.contract import (
    CancelOutcome,
    Event,
    ExecutionMode,
)
from omnirt_tasks.jobs.values import (
    Claim,
    EventDraft,
    Idempotency,
    JobPage,
    JobQuery,
    Lease,
    MustRunAlone,
    NewJob,
    Outcome,
    QueueDepth,
    Reconciled,
    Renewal,
    Requeue,
    ServiceTime,
    StoredJob,
)


class JobStore(Protocol):
    """The truth about every job. Safe to share between threads.

    Every method raises StoreUnavailable when the store cannot be reached, and JobNotFound for an unknown id
    where it takes one (except `claim` and `purge`). A lease is not an id: one of an unknown job is a lost one.
    """

    def create(self, job: NewJob, *, queue_limit: int | None = None) -> StoredJob:
        """Write a new job in state queued, with its `job_enqueued` event. Durable when it returns.

        A split job is written whole, with all its parts. Raises QueueFull when the queue already holds `queue_limit`
        waiting jobs (each part is one), or when it is for jobs with tags, has
        none, and too many queues hold jobs (`effects.QUEUES_MAX`). A second job of the same id, or with an idempotency
        key that stands for a job, changes nothing: the first is returned. Raises IdempotencyMismatch when that key
        came with another fingerprint.
        """
        ...

    def submitted(self, owner: str, idempotency: Idempotency) -> StoredJob | None:
        """The job that the owner's key stands for, if it stands for one. Raises IdempotencyMismatch."""
        ...

    def get(self, job_id: str) -> StoredJob:
        """The job as it stands."""
        ...

    def page(self, query: JobQuery) -> JobPage:
        """The owner's jobs, newest first."""
        ...

    def claim(
        self,
        job_id: str,
        *,
        worker_id: str,
        lease_ttl_ms: int,
        execution_mode: ExecutionMode | None = None,
        alone: bool = False,
        queues: Collection[str] | None = None,
        token: str | None = None,
    ) -> Claim | MustRunAlone | None:
        """Begin the next attempt; None, when there is nothing to do, means to drop the message.

        So it is for a job that is unknown, over, running, waiting for its retry, to be left to another worker, or of
        none of these `queues` (None: of any), whose message has strayed. A lease that has expired is `reconcile`'s to
        take away, which knows whether its holder could renew it.

        `alone` promises that nothing else runs on the device while the attempt does; without it a job that runs alone
        is not claimed (MustRunAlone). Appends `job_started` {attempt, worker_id}. A job whose cancel was asked for is
        never claimed; one that waits past its deadline fails. `execution_mode` is given where it is known already; a
        result brings it in any case.

        `token` is the lease's own, drawn here without one. Who lost the answer claims again with the same token, and
        has what he won.
        """
        ...

    def renew(self, lease: Lease, *, lease_ttl_ms: int) -> Renewal:
        """Hold the lease for another `lease_ttl_ms` from now, by the store's clock.

        A lease that has expired is still held until somebody acts on that.
        """
        ...

    def append(self, lease: Lease, drafts: Sequence[EventDraft], *, call: str | None = None) -> bool:
        """Append events of the current attempt, in order; false (and nothing written) when the lease is lost.

        A `stage_start` moves the record's phase, a `stage_progress` its progress. `call` names what is appended: the
        lease's latest, appended again since the answer was lost, is written once.
        """
        ...

    def commit(self, lease: Lease, outcome: Outcome) -> bool:
        """End the job, once: false (and nothing written) when the lease is lost or the job is over.

        Appends the terminal event. Success after a cancel was asked for is success: the work was done.
        """
        ...

    def checkpoint(self, lease: Lease, *, name: str, step: int) -> bool:
        """Note that the attempt's state after `step` is kept as `name`; false when the lease is lost.

        Appends `checkpoint` {step}. The next attempt's claim has it.
        """
        ...

    def give_back(self, lease: Lease, requeue: Requeue) -> bool:
        """Put a running job back to queued, with `job_requeued` {attempt, reason}; false when the lease is lost.

        If its cancel was asked for, the job becomes cancelled instead; if its deadline has passed, it fails with
        `timeout`; if this is a death too many, it fails with `worker_lost` and is a dead letter. The caller sends the
        message again, unless the job waits for its retry: then the reconciler does.
        """
        ...

    def cancel(self, job_id: str) -> CancelOutcome:
        """Cancel at once if queued; ask the holder to if running; change nothing if over. Idempotent."""
        ...

    def forget_dead_letter(self, job_id: str) -> None:
        """Take a failed job off the list of dead letters: somebody has looked. Idempotent."""
        ...

    def purge(self, job_id: str) -> None:
        """Remove record, events, index entries and idempotency key; a job that is not over ends as cancelled first.

        Idempotent. The files of a job that is over are the caller's to remove, first.
        """
        ...

    def reconcile(self, *, unclaimed_after_ms: int, spare_leases: bool = False) -> Reconciled:
        """Requeue what runs under an expired lease, fail what waits past its deadline, name what may have to be sent.

        That is also what has waited long enough for its retry.

        With `spare_leases` no lease expires in this round: after an outage their holders must have had time to renew.
        A job that is queued for `unclaimed_after_ms` is named once per such period. Whether its message still waits
        in the broker is the caller's to ask (`Reconciler` does). One that a worker left to another is named in the next
        round, since its message went with that claim.
        """
        ...

    def expired(self, limit: int = 100, *, skip: int = 0) -> Sequence[StoredJob]:
        """Jobs whose `expires_at_ms` has passed, for the sweeper to purge: oldest first, without the first `skip`."""
        ...

    def events(self, job_id: str, *, after: int = 0) -> Sequence[Event]:
        """The logged events with seq > `after`, in order (the newest 1,000 are kept)."""
        ...

    def depth(self, queue: str) -> QueueDepth:
        """How many jobs of the queue wait and run."""
        ...

    def position(self, job_id: str) -> int | None:
        """The place of a queued job among its queue's waiting jobs, from 1; None when it does not wait.

        Those of a higher priority come first, then the older; of a split job the first part that waits counts.
        """
        ...

    def service_times(self, queue: str) -> Sequence[ServiceTime]:
        """The newest `effects.SERVICE_TIMES_MAX` service times of the queue, newest first."""
        ...

    def queues(self) -> Sequence[str]:
        """Every queue that holds a job, waiting or running; sorted."""
        ...

    def state_counts(self) -> Mapping[tuple[str, str, str, str], int]:
        """How often each state was entered, by (task, model, execution mode, state); mode "unknown" until known."""
        ...

    def ping(self) -> None:
        """Do nothing, if the store can be reached."""
        ...
