"""Events: what a watcher of a job sees, in order."""

from enum import StrEnum

from omnirt_tasks.contract.base import Answer, JsonObject


class EventName(StrEnum):
    """Every name an event may have."""

    JOB_ENQUEUED = "job_enqueued"
    JOB_STARTED = "job_started"
    JOB_REQUEUED = "job_requeued"
    STAGE_START = "stage_start"
    STAGE_PROGRESS = "stage_progress"
    STAGE_END = "stage_end"
    STAGE_ERROR = "stage_error"
    CACHE_HIT = "cache_hit"
    PREVIEW = "preview"
    CHECKPOINT = "checkpoint"  # the state after `step` is kept: another attempt can go on there
    RESUMED = "resumed"  # this attempt goes on after `step`, from a checkpoint of an earlier one
    PART_STARTED = "part_started"  # {part, attempt, worker_id}: of a job that was split, in place of job_started
    PART_REQUEUED = "part_requeued"  # {part, attempt, reason}
    PART_FINISHED = "part_finished"  # {part, outputs}: as job_finished, but for the last one, with which the job ends
    JOB_FINISHED = "job_finished"
    JOB_FAILED = "job_failed"
    JOB_CANCELLED = "job_cancelled"


TERMINAL_EVENTS = frozenset({EventName.JOB_FINISHED, EventName.JOB_FAILED, EventName.JOB_CANCELLED})


class Event(Answer):
    """One entry of a job's event log.

    `seq` counts from 1 per job without gaps, `stage` is "job" for the job's own events, and `timestamp_ms` is
    Unix time by the store's clock.
    """

    seq: int
    event: EventName
    stage: str
    timestamp_ms: int
    data: JsonObject

    @property
    def terminal(self) -> bool:
        """Whether the job is over with this event; exactly one event of a job is."""
        return self.event in TERMINAL_EVENTS
