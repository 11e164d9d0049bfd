"""POST /v1/generate: the result itself, or a job to follow."""

from flask import Blueprint, Response

from omnirt_tasks.contract import GenerateRequest, GenerateResult, JobRecord
from omnirt_tasks.errors import (
    JobCancelled,
    JobError,
    JobTimeout,
    ModelFailed,
    NonFiniteOutput,
    OutOfMemory,
    StoreUnavailable,
    WorkerLost,
)
from omnirt_tasks.jobs.watch import wait_finished
from omnirt_tasks.results import result_of
from web import errors
from web.answers import job_url, json_answer
from web.auth import current_owner
from web.operations import documented
from web.services import services
from web.submitting import (
    IDEMPOTENCY_KEY,
    PREFER,
    SUBMIT_ERRORS,
    SUBMIT_NOTES,
    job_headers,
    read_request,
    submit,
    submit_asynchronously,
    unwatched,
)

JOB_ERRORS = (JobCancelled, ModelFailed, NonFiniteOutput, OutOfMemory, WorkerLost, JobTimeout)

blueprint = Blueprint("generate", __name__)


@blueprint.post("/v1/generate")
@documented(
    "Generate, and wait for the result; with async_run, submit a job",
    {200: GenerateResult, 202: JobRecord},
    errors=(*SUBMIT_ERRORS, *JOB_ERRORS),
    body=GenerateRequest,
    parameters=(PREFER, IDEMPOTENCY_KEY),
    description=SUBMIT_NOTES,
)
def generate() -> Response:
    """Submit, and wait on the job's terminal event unless the request is asynchronous."""
    wanted = read_request()
    if wanted.async_run:
        return submit_asynchronously(wanted)
    parts = services()
    with parts.waits.held(current_owner()):
        made = submit(wanted)
        job_id = made.job.record.id
        try:
            over = wait_finished(parts.store, parts.feed, job_id, timeout_s=parts.settings.sync_timeout_s)
        except StoreUnavailable as error:
            return unwatched(made, error)
    headers = job_headers(made)
    if over is None:
        limit_s = parts.settings.sync_timeout_s
        late = JobTimeout(f"The job is not over after {limit_s:g} s; it goes on.", f"GET {job_url(job_id)} tells.")
        return errors.answer(late, job_id=job_id, headers=headers)
    try:
        result = result_of(over.record)
    except JobError as failure:
        return errors.answer(failure, job_id=job_id, headers=headers)
    del headers["Location"]
    return json_answer(result, headers=headers)
