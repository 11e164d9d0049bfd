"""Jobs: submit, list, look at, cancel, purge, retry."""

import contextlib
from typing import Literal

from flask import Blueprint, Response

from omnirt_tasks.contract import CancelOutcome, GenerateRequest, JobRecord, JobState, Problem, Task
from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import JobNotFound, ModelNotFound, NotFound, StorageError, ValidationFailed
from omnirt_tasks.jobs.values import JobQuery
from omnirt_tasks.submission import request_again
from web.answers import json_answer, own_job, record_of
from web.auth import current_owner
from web.operations import Parameter, documented
from web.purging import remove
from web.queries import Query
from web.services import services
from web.submitting import (
    IDEMPOTENCY_KEY,
    PREFER,
    SUBMIT_ERRORS,
    SUBMIT_NOTES,
    accepted,
    read_request,
    submit,
    submit_asynchronously,
)

LIMIT_DEFAULT = 20
LIMIT_MAX = 100
CURSOR_CHARS_MAX = 20

LIST_PARAMETERS = (
    Parameter(
        "limit", "Jobs per page.", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT}
    ),
    Parameter("cursor", "The `next_cursor` of an earlier page."),
    Parameter("state", "Only jobs in this state.", {"type": "string", "enum": list(JobState)}),
    Parameter("model", "Only jobs of this model, by id or alias."),
    Parameter("task", "Only jobs of this task.", {"type": "string", "enum": list(Task)}),
    Parameter(
        "dead_letters",
        "Only jobs that failed because whatever ran them died, until they are retried or purged.",
        {"type": "boolean", "default": False},
    ),
)
PURGE = Parameter("purge", "Also remove record, events and files.", {"type": "boolean", "default": False})

blueprint = Blueprint("jobs", __name__)


class JobList(Answer):
    """A page of jobs, newest first, without their results."""

    object: Literal["list"] = "list"
    data: tuple[JobRecord, ...]
    has_more: bool
    next_cursor: str | None


class CancelledRecord(JobRecord):
    """A job's record, and what its cancel came to."""

    cancel: CancelOutcome


@blueprint.post("/v1/jobs")
@documented(
    "Submit a job",
    {202: JobRecord, 200: JobRecord},
    errors=SUBMIT_ERRORS,
    body=GenerateRequest,
    parameters=(PREFER, IDEMPOTENCY_KEY),
    description=SUBMIT_NOTES,
)
def submit_job() -> Response:
    """Always asynchronous."""
    wanted = read_request()
    if "async_run" in wanted.model_fields_set and not wanted.async_run:
        told = "false is not accepted: jobs are always asynchronous; leave it out, or POST /v1/generate."
        here = Problem(loc="async_run", rule="choice", message=told)
        raise ValidationFailed([here, *services().submission.check(wanted, current_owner()).problems])
    return submit_asynchronously(wanted.model_copy(update={"async_run": True}))


@blueprint.get("/v1/jobs")
@documented("List jobs, newest first", {200: JobList}, errors=(ValidationFailed,), parameters=LIST_PARAMETERS)
def list_jobs() -> Response:
    """The caller's jobs."""
    query = Query(LIST_PARAMETERS)
    model = query.text("model")
    with contextlib.suppress(ModelNotFound):  # a model of yesterday still has jobs
        model = model and services().catalog.find(model).id
    wanted = JobQuery(
        owner=current_owner(),
        limit=query.number("limit", LIMIT_DEFAULT, minimum=1, maximum=LIMIT_MAX),
        cursor=query.digits("cursor", CURSOR_CHARS_MAX),
        state=query.choice("state", JobState),
        model=model,
        task=query.choice("task", Task),
        dead_letters=query.flag("dead_letters"),
    )
    query.check()
    page = services().store.page(wanted)
    records = (record_of(job).model_copy(update={"result": None}) for job in page.jobs)
    more = page.next_cursor is not None
    return json_answer(JobList(data=tuple(records), has_more=more, next_cursor=page.next_cursor))


@blueprint.get("/v1/jobs/<job_id>")
@documented("A job's record", {200: JobRecord}, errors=(JobNotFound,))
def show_job(job_id: str) -> Response:
    """The record as it stands."""
    return json_answer(record_of(own_job(job_id, current_owner())))


@blueprint.delete("/v1/jobs/<job_id>")
@documented(
    "Cancel a job; with purge, remove it",
    {200: CancelledRecord, 204: None},
    errors=(JobNotFound, StorageError),
    parameters=(PURGE,),
)
def cancel_job(job_id: str) -> Response:
    """Idempotent, except that a purged job is gone."""
    query = Query((PURGE,))
    purge = query.flag(PURGE.name)
    query.check()
    job = own_job(job_id, current_owner())
    if purge:
        remove(services(), job)
        return Response(status=204)
    outcome = services().store.cancel(job_id)
    record = record_of(services().store.get(job_id))
    return json_answer(CancelledRecord(**dict(record), cancel=outcome))


@blueprint.post("/v1/jobs/<job_id>/retry")
@documented(
    "Submit a failed or cancelled job anew",
    {202: JobRecord},
    errors=(JobNotFound, NotFound, *SUBMIT_ERRORS),
    parameters=(IDEMPOTENCY_KEY,),
    description=(
        "The new job has the same request and seed. Repeated, it answers with the same new job, as if under an "
        "Idempotency-Key. A dead letter is one no longer."
    ),
)
def retry_job(job_id: str) -> Response:
    """A job that is not over, or has succeeded, has no retry: the address is not there, as an artifact's is not."""
    job = own_job(job_id, current_owner())
    if job.record.state not in {JobState.FAILED, JobState.CANCELLED}:
        raise NotFound(f"The job is {job.record.state}.", "Only one that failed or was cancelled can be retried.")
    made = submit(request_again(job), default_key=f"{job_id}/{job.record.attempt}/retry")
    # Last: whoever dies before it leaves a letter that is retried again. A job that was purged by now has none.
    with contextlib.suppress(JobNotFound):
        services().store.forget_dead_letter(job_id)
    return accepted(made)
