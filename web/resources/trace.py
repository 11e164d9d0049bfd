"""GET /v1/jobs/{id}/trace: where a job's time went, as spans made from its event log."""

import hashlib
from collections.abc import Iterable
from enum import StrEnum

from flask import Blueprint, Response
from pydantic import JsonValue

from omnirt_tasks.contract import TERMINAL_EVENTS, Event, EventName, JobState, Task
from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.jobs.store import StoredJob
from web.answers import json_answer, own_job
from web.auth import current_owner
from web.operations import documented
from web.services import services

blueprint = Blueprint("trace", __name__)

# What ends an attempt, and with it every stage that it left open.
_ATTEMPT_ENDS = TERMINAL_EVENTS | {EventName.JOB_REQUEUED}


class SpanStatus(StrEnum):
    """How a span went; unset while it is open."""

    OK = "ok"
    ERROR = "error"
    UNSET = "unset"


class Span(Answer):
    """A stretch of a job's life; times in Unix milliseconds, the end null while it is open."""

    span_id: str
    parent_span_id: str | None
    name: str
    stage: str
    started_at_ms: int
    ended_at_ms: int | None
    status: SpanStatus
    attributes: dict[str, JsonValue]


class Trace(Answer):
    """A job's spans; the first, the root, covers the rest."""

    trace_id: str | None
    job_id: str
    task: Task
    model: str
    worker_id: str | None
    state: JobState
    spans: tuple[Span, ...]


@blueprint.get("/v1/jobs/<job_id>/trace")
@documented("A job's spans", {200: Trace}, errors=(JobNotFound,))
def show_trace(job_id: str) -> Response:
    """One root span, and one for each stage of each attempt."""
    job = own_job(job_id, current_owner())
    root = _root(job)
    trace = Trace(
        trace_id=job.record.trace_id,
        job_id=job_id,
        task=job.resolved.task,
        model=job.resolved.model,
        worker_id=job.record.worker_id,
        state=job.record.state,
        spans=(root, *_stages(job_id, services().store.events(job_id), root.span_id)),
    )
    return json_answer(trace)


def _root(job: StoredJob) -> Span:
    record = job.record
    status = SpanStatus.UNSET
    if record.finished:
        status = SpanStatus.ERROR if record.state is JobState.FAILED else SpanStatus.OK
    return Span(
        span_id=_span_id(record.id, "root"),
        parent_span_id=None,
        name="job",
        stage="job",
        started_at_ms=record.enqueued_at_ms,
        ended_at_ms=record.finished_at_ms,
        status=status,
        attributes={"queue": job.queue, "backend": record.backend, "attempts": record.attempt},
    )


def _stages(job_id: str, events: Iterable[Event], root_id: str) -> list[Span]:
    spans: list[Span] = []
    open_at: dict[str, int] = {}  # stage → its place in `spans`
    attempt: JsonValue = None

    def close(place: int, event: Event, status: SpanStatus) -> None:
        spans[place] = spans[place].model_copy(update={"ended_at_ms": event.timestamp_ms, "status": status})

    for event in events:
        if event.event is EventName.JOB_STARTED:
            attempt = event.data.get("attempt")
        elif event.event is EventName.STAGE_START:
            open_at[event.stage] = len(spans)
            spans.append(
                Span(
                    span_id=_span_id(job_id, str(event.seq)),
                    parent_span_id=root_id,
                    name=event.stage,
                    stage=event.stage,
                    started_at_ms=event.timestamp_ms,
                    ended_at_ms=None,
                    status=SpanStatus.UNSET,
                    attributes={"attempt": attempt},
                )
            )
        elif event.event in {EventName.STAGE_END, EventName.STAGE_ERROR} and event.stage in open_at:
            failed = event.event is EventName.STAGE_ERROR
            close(open_at.pop(event.stage), event, SpanStatus.ERROR if failed else SpanStatus.OK)
        elif event.event in _ATTEMPT_ENDS:
            for place in open_at.values():
                close(place, event, SpanStatus.ERROR)
            open_at.clear()
    return spans


def _span_id(job_id: str, part: str) -> str:
    """The same for the same span, however often it is asked for."""
    return hashlib.sha256(f"{job_id}/{part}".encode()).hexdigest()[:16]
