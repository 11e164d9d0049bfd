"""What an event or an outcome does to the record: the rules that both stores share."""

from dataclasses import dataclass

from omnirt_tasks.contract import EventName, ExecutionMode, JobState, Phase, Progress
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.contract.states import PHASE_OF_STAGE
from omnirt_tasks.jobs.store import Cancelled, EventDraft, Failed, Outcome, Succeeded

EVENT_LOG_LENGTH = 1_000
"""How many events of a job are kept; the scripts say the same."""

JOB_STAGE = "job"
"""The stage of the job's own events."""

LEASE_EXPIRED = "lease_expired"
"""The reason of a `job_requeued` that nobody asked for."""


@dataclass(frozen=True)
class Ending:
    """How an outcome ends a job: the state, the terminal event, and the execution mode where the outcome tells it."""

    state: JobState
    event: EventName
    data: JsonObject
    execution_mode: ExecutionMode | None = None


def ending(outcome: Outcome) -> Ending:
    """How the outcome ends its job."""
    match outcome:
        case Succeeded(result):
            names: JsonObject = {"outputs": [output.name for output in result.outputs]}
            return Ending(JobState.SUCCEEDED, EventName.JOB_FINISHED, names, result.metadata.execution_mode)
        case Failed(error):
            return Ending(JobState.FAILED, EventName.JOB_FAILED, {"error": error.model_dump(mode="json")})
        case Cancelled():
            return Ending(JobState.CANCELLED, EventName.JOB_CANCELLED, {})


def phase_of(draft: EventDraft) -> Phase | None:
    """The phase that begins with the event, if one does; a model's own stages count as denoising."""
    return PHASE_OF_STAGE.get(draft.stage, Phase.DECODE) if draft.event is EventName.STAGE_START else None


def progress_of(draft: EventDraft) -> Progress | None:
    """The progress that the event tells of, if it does."""
    step, total = draft.data.get("step"), draft.data.get("total")
    if draft.event is not EventName.STAGE_PROGRESS or not isinstance(step, int) or not isinstance(total, int):
        return None
    return progress(step, total)


def progress(step: int, total: int) -> Progress:
    """Progress with its fraction, 0 to 1."""
    return Progress(step=step, total=total, fraction=min(1.0, step / total) if total > 0 else 0.0)
