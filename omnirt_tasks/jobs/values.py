"""What a job store is given and gives: values that never change."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omnirt_tasks.contract import (
    ErrorInfo,
    EventName,
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
