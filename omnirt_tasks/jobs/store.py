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

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from omnirt_tasks.contract import (
    CancelOutcome,
    ErrorInfo,
    Event,
    EventName,
    ExecutionMode,
    GenerateResult,
    JobRecord,
    JobState,
    Priority,
    ResolvedRequest,
    Task,
)
from omnirt_tasks.contract.base import JsonObject


@dataclass(frozen=True)
class Idempotency:
    """A caller's own name for a submit: for `ttl_ms`, the same `key` of the same owner means the same job.

    `fingerprint` tells one body from another.
    """

    key: str
    fingerprint: str
    ttl_ms: int


@dataclass(frozen=True)
class NewPart:
    """A part of a job that is split: what it runs, and the place of its first output in the job's result.

    Its id is the job's with its number, from 0: `part_id`.
    """

    resolved: ResolvedRequest
    first_output: int


def part_id(job_id: str, part: int) -> str:
    """The id of a job's part, under which it is claimed, leased and sent."""
    return f"{job_id}.{part}"


@dataclass(frozen=True)
class NewJob:
    """A job as it is accepted; `queue` is the full queue name, `owner` the id of the key that sent it, or "".

    `request` is the one the caller wrote, with data URLs already replaced by upload references. The deadline of
    `resolved` counts from the store's clock. `parts` are those that it is run as, in the order of its outputs; none
    where it runs as it is.
    """

    id: str
    owner: str
    queue: str
    request: JsonObject
    resolved: ResolvedRequest
    trace_id: str | None = None
    traceparent: str | None = None
    idempotency: Idempotency | None = None
    parts: tuple[NewPart, ...] = ()


@dataclass(frozen=True)
class WakeUp:
    """The message that a job (or a part of one) waits on its queue; `priority` is the one that it counts as by now."""

    job_id: str
    queue: str
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True)
class PartOf:
    """Which part of which job a stored job is: part `number` (from 0) of `total`."""

    job_id: str
    number: int
    total: int
    first_output: int


@dataclass(frozen=True)
class Origin:
    """Where the files of an output lie: below the job or part that made it, and its committed attempt."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class ServiceTime:
    """How long a job, or part of one, ran that succeeded: from claim to commit. `kind` says what it was alike to.

    Alike are jobs of one model, task, size and number of steps and pictures: `effects.service_kind`.
    """

    kind: str
    duration_ms: int


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a job after `step` is kept: below the files of `attempt`, as `name`."""

    attempt: int
    name: str
    step: int


@dataclass(frozen=True)
class StoredJob:
    """A job with what only the project itself may see: owner, queue, resolved request, end of the lease.

    `last_seq` is the number of its newest event. The record's `queue` has the name alone: its workers and the
    position are the reader's to add; `position` (from 1) spares him asking where the step that gave this job told it.

    `runs_alone` says that its next attempt is to have a device to itself, `deaths` how many attempts died while they
    had, `retries` how many were given back to be tried again, and `checkpoint` where the next one can go on.

    `priority` is the one that it counts as by now. A job that was split has `parts`, the ids of its parts, which alone
    are claimed, leased and sent; its own record follows them. `part` says which part of which job this one is: no
    client sees it. `origins` tells where each output of a succeeded job lies, by its name.
    """

    record: JobRecord
    owner: str
    queue: str
    resolved: ResolvedRequest
    traceparent: str | None = None
    lease_expires_at_ms: int | None = None
    last_seq: int = 0
    position: int | None = field(default=None, compare=False)
    runs_alone: bool = False
    deaths: int = 0
    retries: int = 0
    checkpoint: Checkpoint | None = None
    priority: Priority = Priority.NORMAL
    parts: tuple[str, ...] = ()
    part: PartOf | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def wake_ups(self) -> tuple[WakeUp, ...]:
        """The messages of the job: its own, or those of its parts."""
        return tuple(WakeUp(job_id, self.queue, self.priority) for job_id in self.parts or (self.record.id,))


@dataclass(frozen=True)
class Lease:
    """The right to work on a job as its `attempt`; `token` is known to the holder alone."""

    job_id: str
    attempt: int
    token: str


@dataclass(frozen=True)
class Claim:
    """A claim that was won: the lease, and the job as it stood after it.

    `remaining_ms` is how long its deadline leaves the attempt.
    """

    lease: Lease
    job: StoredJob
    remaining_ms: int | None = None


@dataclass(frozen=True)
class MustRunAlone:
    """A claim that was not made: the job is to be claimed by whoever has, and gives it, a device to itself.

    Whoever was told so counts for `effects.AWAITED_MS` as the worker that waits until its device is free for the job,
    and claims again to go on so. `awaited` says that another worker does: one whose device is not free now leaves the
    job to it, lest a single job empties every device.
    """

    awaited: bool = False


@dataclass(frozen=True)
class Requeue:
    """How an attempt that is over sends its job back to its queue.

    `died` says that what ran it died: from then on it runs alone, and if it did, the death counts. `alone` asks for a
    device to itself without any blame, `retry` counts as one. The job waits for `delay_ms` before it can be claimed,
    and the worker that gives it back may not claim it for `avoid_ms` after that, so that another may.
    """

    reason: str
    died: bool = False
    alone: bool = False
    retry: bool = False
    delay_ms: int = 0
    avoid_ms: int = 0


@dataclass(frozen=True)
class Renewal:
    """What became of a lease: `held` is false when the attempt is no longer the job's; stop, and publish nothing."""

    held: bool
    cancel_requested: bool = False


@dataclass(frozen=True)
class EventDraft:
    """An event without its number and time, which the store gives it.

    The data of a `stage_progress` holds `step` and `total`, so that the record's progress follows the log.
    """

    event: EventName
    stage: str
    data: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Succeeded:
    """The outcome of an attempt that made its result."""

    result: GenerateResult


@dataclass(frozen=True)
class Failed:
    """The outcome of an attempt that did not; the job is failed for good."""

    error: ErrorInfo


@dataclass(frozen=True)
class Cancelled:
    """The outcome of an attempt that was cancelled on the caller's wish."""


Outcome = Succeeded | Failed | Cancelled


@dataclass(frozen=True)
class JobQuery:
    """Which jobs to list: newest first, at most `limit` (1 to 100), after `cursor` (from an earlier page).

    `dead_letters` lists those alone.
    """

    owner: str
    limit: int = 20
    cursor: str | None = None
    state: JobState | None = None
    model: str | None = None
    task: Task | None = None
    dead_letters: bool = False

    @property
    def filtered(self) -> bool:
        """Whether some of the owner's jobs may not match."""
        return self.state is not None or self.model is not None or self.task is not None

    def matches(self, job: StoredJob) -> bool:
        """Whether a job of the owner's belongs on the list."""
        return (
            (self.state is None or job.record.state is self.state)
            and (self.model is None or job.resolved.model == self.model)
            and (self.task is None or job.resolved.task is self.task)
        )


@dataclass(frozen=True)
class JobPage:
    """A page of jobs, without their results; `next_cursor` is None on the last one.

    With a filter a page may be short of `limit`, even empty, before the last one: the search per page is bounded.
    """

    jobs: Sequence[StoredJob]
    next_cursor: str | None


@dataclass(frozen=True)
class Reconciled:
    """What one round of reconciling found.

    `resend` are to be sent (again), those that have come to a higher priority among them; `expired` the ids of those
    whose lease had expired and `overdue` of those whose deadline had passed: these have failed, the others too if that
    was a death too many.
    """

    resend: Sequence[WakeUp] = ()
    expired: Sequence[str] = ()
    overdue: Sequence[str] = ()


@dataclass(frozen=True)
class QueueDepth:
    """How many jobs of a queue wait, and how many run; `by_priority` tells those that wait apart, where some do."""

    waiting: int
    running: int
    by_priority: Mapping[Priority, int] = field(default_factory=dict, compare=False)

    def __add__(self, other: "QueueDepth") -> "QueueDepth":
        """The depth of two queues together."""
        by_priority = Counter(self.by_priority) + Counter(other.by_priority)
        return QueueDepth(self.waiting + other.waiting, self.running + other.running, by_priority)


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


@dataclass(frozen=True)
class Missed:
    """Events may have been lost, by a slow watcher or while the connection was away: read the log."""


class EventSource(Protocol):
    """Live events, for watchers of one job. Safe to share between threads."""

    def subscribe(self, job_id: str) -> "Subscription":
        """Start to receive the job's events; returns once nothing published from now on can be missed.

        Raises StoreUnavailable when the store cannot be reached.
        """
        ...


class EventFeed(EventSource, Protocol):
    """The live events of a process, and what else is told beside them."""

    def on_cancel(self, callback: Callable[[str], None]) -> None:
        """Call `callback` with the id of each running job whose cancel is asked for, from a thread of the feed.

        Notices may be lost with the connection; a renewal tells the same, later. Raises StoreUnavailable.
        """
        ...

    def close(self) -> None:
        """Stop receiving; every subscription ends. Idempotent."""
        ...


class Subscription(Protocol):
    """One watcher's bounded queue. Not shared between threads."""

    def next(self, timeout_s: float) -> Event | Missed | None:
        """The next live event, or None after `timeout_s`.

        A slow watcher loses events and is told so by Missed; the terminal event always arrives. Raises
        StoreUnavailable when the feed is closed.
        """
        ...

    def wake(self) -> None:
        """Let the `next` that waits, or else the next one, return None at once. Any thread may call it."""
        ...

    def close(self) -> None:
        """Stop receiving. Idempotent."""
        ...
