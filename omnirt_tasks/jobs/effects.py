"""What an event or an outcome does to the record: the rules that both stores share."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from omnirt_tasks.contract import (
    ErrorInfo,
    EventName,
    ExecutionMode,
    JobRecord,
    JobState,
    Phase,
    Priority,
    Progress,
    QueueStatus,
    ResolvedRequest,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.contract.job import PartCounts
from omnirt_tasks.contract.request import TAG_MARK
from omnirt_tasks.contract.states import PHASE_OF_STAGE
from omnirt_tasks.errors import IdempotencyMismatch, JobNotFound, JobTimeout, QueueFull, WorkerLost
from omnirt_tasks.jobs.values import Cancelled, EventDraft, Failed, NewJob, Outcome, Succeeded
from omnirt_tasks.registry.work import count_pictures

EVENT_LOG_LENGTH = 1_000
"""How many events of a job are kept."""

DEATHS_MAX = 3
"""How many deaths while alone a job may come to, where a store is told nothing else."""

QUEUES_MAX = 1_000
"""How many queues may hold jobs before a further one is opened for tags, which callers are free to invent."""

AWAITED_MS = 5_000
"""How long the word of a worker counts that it waits for a device to be free for a job that runs alone."""

PROMOTE_AFTER_S = 600.0
"""How long a job waits until it counts as of the next higher priority, where a store is told nothing else."""

RANKS: Mapping[Priority, int] = MappingProxyType({Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2})
"""The place of each priority among those that wait; the lowest goes first."""

NEXT_HIGHER: Mapping[Priority, Priority] = MappingProxyType(
    {Priority.NORMAL: Priority.HIGH, Priority.LOW: Priority.NORMAL}
)
"""What a job of each priority is promoted to."""

SERVICE_TIMES_MAX = 200
"""How many service times of a queue are kept."""

SERVICE_TIMES_KEPT_MS = 7 * 24 * 3600 * 1000
"""How long the service times of a queue are kept after the newest of them."""

JOB_STAGE = "job"
"""The stage of the job's own events."""

LOAD_STAGE = "load"
LEASE_EXPIRED = "lease_expired"
"""The reason of a `job_requeued` that nobody asked for."""


@dataclass(frozen=True)
class Ending:
    """How an outcome ends a job: the state, the terminal event, and the execution mode where the outcome tells it."""

    state: JobState
    event: EventName
    data: JsonObject
    execution_mode: ExecutionMode | None = None


def accepted(job: NewJob, now_ms: int) -> JobRecord:
    """The record of a job that begins its life now."""
    return JobRecord(
        id=job.id,
        job_id=job.id,
        state=JobState.QUEUED,
        queue=QueueStatus(name=job.queue, workers=0),
        priority=job.resolved.priority,
        backend=job.resolved.backend,
        request=job.request,
        metadata=job.resolved.metadata,
        trace_id=job.trace_id,
        enqueued_at_ms=now_ms,
        deadline_at_ms=None if (limit_ms := deadline_ms(job)) is None else now_ms + limit_ms,
        parts=PartCounts(total=total, queued=total, running=0, succeeded=0) if (total := len(job.parts)) else None,
    )


def deadline_ms(job: NewJob) -> int | None:
    """How long after it is accepted the job may take, if it has a deadline."""
    deadline_s = job.resolved.deadline_s
    return None if deadline_s is None else max(1, round(deadline_s * 1000))


def remaining_ms(record: JobRecord) -> int | None:
    """How long its deadline left the attempt when it began, if there is one."""
    if record.deadline_at_ms is None or record.started_at_ms is None:
        return None
    return record.deadline_at_ms - record.started_at_ms


def service_kind(resolved: ResolvedRequest) -> str:
    """What a job is alike to in the time that it takes: model, task, size, steps, and how many pictures or frames."""
    config = resolved.config
    sizes = (config.get("width"), config.get("height"), config.get("num_inference_steps"), resolved.inputs.num_frames)
    return " ".join(map(str, (resolved.model, resolved.task, *sizes, count_pictures(resolved))))


def queues_max(queue: str) -> int | None:
    """How many queues may hold jobs for this one to be opened; None: without limit, since models name it."""
    return QUEUES_MAX if TAG_MARK in queue else None


def queue_full(queue: str, limit: int | None) -> QueueFull:
    """The refusal of a job whose queue holds its limit of waiting jobs."""
    return QueueFull(f"The queue {queue} holds {limit} waiting jobs, its limit.", "Try again later.")


def too_many_queues() -> QueueFull:
    """The refusal of a job whose tags would open a queue too many."""
    return QueueFull(
        f"Jobs wait in {QUEUES_MAX} queues, and no more are opened for tags.", "Try again later, or without tags."
    )


def unknown_job(job_id: str) -> JobNotFound:
    """What is said of a job that is not there, or not the caller's."""
    return JobNotFound(f"There is no job {job_id[:64]!r}.", "It may have expired, or been purged.")


def idempotency_mismatch(key: str) -> IdempotencyMismatch:
    """The refusal of a key that came before, with another body."""
    return IdempotencyMismatch(
        f"The idempotency key {key[:64]!r} stands for a job with another body.", "Use a new key for a new job."
    )


def deadline_passed() -> ErrorInfo:
    """Why a job failed whose deadline passed while it waited."""
    return JobTimeout(
        "The job's deadline (deadline_s) passed before it was done.", "Give it more time, or try again later."
    ).info()


def died_too_often(deaths_max: int) -> ErrorInfo:
    """Why a job is a dead letter."""
    times = "once" if deaths_max == 1 else f"{deaths_max} times"
    return WorkerLost(
        f"What ran the job died {times} while it ran nothing else.",
        "Look at the workers' logs; once the cause is mended, retry the job, or else drop it from the dead letters.",
    ).info()


def failure(error: ErrorInfo) -> JsonObject:
    """The data of a `job_failed`."""
    return {"error": error.model_dump(mode="json")}


def ending(outcome: Outcome) -> Ending:
    """How the outcome ends its job."""
    match outcome:
        case Succeeded(result):
            names: JsonObject = {"outputs": [output.name for output in result.outputs]}
            return Ending(JobState.SUCCEEDED, EventName.JOB_FINISHED, names, result.metadata.execution_mode)
        case Failed(error):
            return Ending(JobState.FAILED, EventName.JOB_FAILED, failure(error))
        case Cancelled():
            return Ending(JobState.CANCELLED, EventName.JOB_CANCELLED, {})


def phase_of(draft: EventDraft) -> Phase | None:
    """The phase that begins with the event, if one does; a model's own stages count as denoising."""
    return PHASE_OF_STAGE.get(draft.stage, Phase.DECODE) if draft.event is EventName.STAGE_START else None


def progress_of(draft: EventDraft) -> Progress | None:
    """The progress that the event tells of, if it does; a model's loading is none of a job's steps."""
    step, total = draft.data.get("step"), draft.data.get("total")
    if (
        draft.event not in {EventName.STAGE_PROGRESS, EventName.RESUMED}
        or draft.stage == LOAD_STAGE
        or not isinstance(step, int)
        or not isinstance(total, int)
    ):
        return None
    return progress(step, total)


def without_progress(data: JsonObject) -> JsonObject:
    """The data of an event that tells of progress, but for that."""
    return {name: value for name, value in data.items() if name not in {"step", "total"}}


def progress(step: int, total: int) -> Progress:
    """Progress with its fraction, 0 to 1."""
    return Progress(step=step, total=total, fraction=min(1.0, step / total) if total > 0 else 0.0)
