"""From a body to an accepted job, for every route that takes one."""

import re

from flask import Response, request

from omnirt_tasks.contract import GenerateRequest, Problem
from omnirt_tasks.errors import (
    BackendUnsupported,
    InsufficientMemory,
    InvalidJson,
    ModelNotFound,
    ModelTierDisabled,
    QueueFull,
    StorageError,
    StoreUnavailable,
    StubDisabled,
    TooLarge,
    TooManyStreams,
    UploadNotFound,
    ValidationFailed,
)
from omnirt_tasks.jobs.store import StoredJob
from omnirt_tasks.jobs.watch import wait_finished
from omnirt_tasks.validation import parse_request
from web import errors
from web.answers import job_url, json_answer, record_of
from web.auth import current_owner
from web.bodies import read_body
from web.operations import Parameter
from web.services import services

RETRY_AFTER_S = 1
PREFER_WAIT_MAX_S = 60

PREFER = Parameter(
    "Prefer",
    f"`wait=N`: answer 200 with the finished record if the job ends within N seconds (at most {PREFER_WAIT_MAX_S}).",
    where="header",
)

SUBMIT_ERRORS = (
    InvalidJson,
    ValidationFailed,
    BackendUnsupported,
    InsufficientMemory,
    ModelNotFound,
    UploadNotFound,
    ModelTierDisabled,
    StubDisabled,
    TooLarge,
    QueueFull,
    TooManyStreams,
    StorageError,
)
"""What every route that submits may answer."""

_WAIT = re.compile(r"\s*wait\s*=\s*\"?(\d{1,9})\"?\s*", re.ASCII | re.IGNORECASE)


def read_request() -> GenerateRequest:
    """The request in the body. Raises InvalidJson, ValidationFailed and what else is wrong with it."""
    if "Idempotency-Key" in request.headers:
        told = "The header is not supported yet; leave it out."
        raise ValidationFailed([Problem(loc="Idempotency-Key", rule="unsupported", message=told)])
    parts = services()
    return parse_request(read_body(), parts.catalog, parts.submission.door)


def submit(wanted: GenerateRequest) -> StoredJob:
    """Accept the job for the caller. Raises like `Submission.submit`."""
    parts = services()
    attributes = {"omnirt.task": wanted.task, "omnirt.model": wanted.model}
    with parts.tracing.span(
        "omnirt.submit", traceparent=request.headers.get("traceparent"), attributes=attributes
    ) as at:
        return parts.submission.submit(wanted, owner=current_owner(), trace_id=at.trace_id, traceparent=at.traceparent)


def submit_asynchronously(wanted: GenerateRequest) -> Response:
    """Accept the job: 202 and its record, or 200 when the caller prefers to wait and it ends in time."""
    wait_s = _preferred_wait_s()
    if wait_s is None:
        return _accepted(submit(wanted))
    parts = services()
    with parts.waits.held(current_owner()):
        job_id = submit(wanted).record.id
        try:
            over = wait_finished(parts.store, parts.feed, job_id, timeout_s=wait_s)
            answer = _accepted(parts.store.get(job_id)) if over is None else json_answer(record_of(over))
        except StoreUnavailable as error:
            return unwatched(job_id, error)
    answer.headers["Location"] = job_url(job_id)
    answer.headers["Preference-Applied"] = f"wait={wait_s}"
    return answer


def unwatched(job_id: str, error: StoreUnavailable) -> Response:
    """The answer for an accepted job that cannot be waited for any longer: its id must not be lost with that."""
    told = StoreUnavailable(
        f"{error.message} The job {job_id} was accepted, and goes on.", f"GET {job_url(job_id)} tells of it."
    )
    return errors.answer(told, job_id=job_id, headers=job_headers(job_id))


def job_headers(job_id: str) -> dict[str, str]:
    """Where the job is that an answer tells of in other words than its record."""
    return {"X-Omnirt-Job-Id": job_id, "Location": job_url(job_id)}


def _accepted(job: StoredJob) -> Response:
    headers = {"Location": job_url(job.record.id), "Retry-After": str(RETRY_AFTER_S)}
    return json_answer(record_of(job), 202, headers)


def _preferred_wait_s() -> int | None:
    """How long the caller prefers to wait, as much of it as is granted; None if he does not say."""
    for preference in ",".join(request.headers.getlist("Prefer")).split(","):
        if found := _WAIT.fullmatch(preference.partition(";")[0]):
            return min(int(found[1]), PREFER_WAIT_MAX_S)
    return None
