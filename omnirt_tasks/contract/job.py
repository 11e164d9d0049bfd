"""The job record: what a client is told about a job."""

from enum import StrEnum

from pydantic import Field

from omnirt_tasks.contract.base import Answer, JsonObject
from omnirt_tasks.contract.errors import ErrorInfo
from omnirt_tasks.contract.request import Priority
from omnirt_tasks.contract.result import ExecutionMode, GenerateResult
from omnirt_tasks.contract.states import TERMINAL_STATES, JobState, Phase


class CancelOutcome(StrEnum):
    """What a cancel came to."""

    CANCELLED = "cancelled"  # it was queued, and will never run
    REQUESTED = "requested"  # it is running, and ends at its next device call
    ALREADY_FINISHED = "already_finished"  # nothing changed


class Progress(Answer):
    """Denoising steps done of `total`; `fraction` is 0 to 1."""

    step: int
    total: int
    fraction: float


class QueueStatus(Answer):
    """Where a queued job waits: live `workers` of the queue, `position` from 1, and when it may be done.

    `eta_s` is how long from now until its end in half of all cases, `eta_p90_s` in nine of ten, as far as what ended
    lately tells; null where nothing does, or nobody serves the queue.
    """

    name: str
    workers: int
    position: int | None = None
    eta_s: float | None = None
    eta_p90_s: float | None = None


class PartCounts(Answer):
    """How the parts of a job stand that was split; together they are `total`, until one fails or is cancelled."""

    total: int
    queued: int
    running: int
    succeeded: int


class JobRecord(Answer):
    """A job as clients see it; every key is always present, null where it does not apply. Times are Unix ms.

    A `dead_letter` has failed because whatever ran it died, as often as is allowed; it waits for somebody to look.
    """

    id: str
    job_id: str
    state: JobState
    phase: Phase | None = None
    progress: Progress | None = None
    queue: QueueStatus | None = None
    priority: Priority = Priority.NORMAL
    attempt: int = 0
    cancel_requested: bool = False
    backend: str
    request: JsonObject
    metadata: dict[str, str] = Field(default_factory=dict)
    error: ErrorInfo | None = None
    trace_id: str | None = None
    worker_id: str | None = None
    execution_mode: ExecutionMode | None = None
    enqueued_at_ms: int
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    expires_at_ms: int | None = None
    deadline_at_ms: int | None = None
    dead_letter: bool = False
    parts: PartCounts | None = None
    result: GenerateResult | None = None

    @property
    def finished(self) -> bool:
        """Whether the job is over."""
        return self.state in TERMINAL_STATES
