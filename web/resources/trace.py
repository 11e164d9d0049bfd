"""GET /v1/jobs/{id}/trace: where a job's time went, as spans made from its event log."""

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from flask import Blueprint, Response
from pydantic import JsonValue

from omnirt_tasks.contract import TERMINAL_EVENTS, Event, EventName, JobState, Task
from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.jobs.values import StoredJob
from web.answers import json_answer, own_job
from web.auth import current_owner
from web.operations import documented
from web.services import services

blueprint = Blueprint("trace", __name__)

# What ends an attempt, and with it every stage that it left open.
_ATTEMPT_ENDS = TERMINAL_EVENTS | {EventName.JOB_REQUEUED, EventName.PART_REQUEUED, EventName.PART_FINISHED}
PART = "part"
"""Under which the events of a split job's parts tell which of them they are of."""


class _Stage(NamedTuple):
    """A stage that may be open: of a part of a split job, or (None) of one that is whole."""

    part: JsonValue
    name: str


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
    """One root span, and one for each stage of each attempt, of the job or of its parts."""
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
    open_at: dict[_Stage, int] = {}  # a part's stage → its place in `spans`
    attempts: dict[JsonValue, JsonValue] = {}  # a part → its attempt

    def close(place: int, event: Event, status: SpanStatus) -> None:
        spans[place] = spans[place].model_copy(update={"ended_at_ms": event.timestamp_ms, "status": status})

    for event in events:
        part = event.data.get(PART)
        here = _Stage(part, event.stage)
        if event.event in {EventName.JOB_STARTED, EventName.PART_STARTED}:
            attempts[part] = event.data.get("attempt")
        elif event.event is EventName.STAGE_START:
            open_at[here] = len(spans)
            spans.append(
                Span(
                    span_id=_span_id(job_id, str(event.seq)),
                    parent_span_id=root_id,
                    name=event.stage,
                    stage=event.stage,
                    started_at_ms=event.timestamp_ms,
                    ended_at_ms=None,
                    status=SpanStatus.UNSET,
                    attributes={"attempt": attempts.get(part), **({} if part is None else {PART: part})},
                )
            )
        elif event.event in {EventName.STAGE_END, EventName.STAGE_ERROR} and here in open_at:
            failed = event.event is EventName.STAGE_ERROR
            close(open_at.pop(here), event, SpanStatus.ERROR if failed else SpanStatus.OK)
        elif event.event in _ATTEMPT_ENDS:
            ended = [stage for stage in open_at if stage.part == part or event.terminal]
            for stage in ended:
                close(open_at.pop(stage), event, SpanStatus.ERROR)
    return spans


def _span_id(job_id: str, part: str) -> str:
    """The same for the same span, however often it is asked for."""
    return hashlib.sha256(f"{job_id}/{part}".encode()).hexdigest()[:16]
