"""From a body to an accepted job, for every route that takes one."""

import re

from flask import Response, request

from omnirt_tasks.contract import GenerateRequest, Problem
from omnirt_tasks.errors import ValidationFailed
from omnirt_tasks.jobs.store import StoredJob
from omnirt_tasks.jobs.watch import wait_finished
from omnirt_tasks.validation import parse_request
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
        job = submit(wanted)
        over = wait_finished(parts.store, parts.feed, job.record.id, timeout_s=wait_s)
    answer = _accepted(parts.store.get(job.record.id)) if over is None else json_answer(record_of(over))
    answer.headers["Location"] = job_url(job.record.id)
    answer.headers["Preference-Applied"] = f"wait={wait_s}"
    return answer


def _accepted(job: StoredJob) -> Response:
    headers = {"Location": job_url(job.record.id), "Retry-After": str(RETRY_AFTER_S)}
    return json_answer(record_of(job), 202, headers)


def _preferred_wait_s() -> int | None:
    """How long the caller prefers to wait, as much of it as is granted; None if he does not say."""
    for preference in ",".join(request.headers.getlist("Prefer")).split(","):
        if found := _WAIT.fullmatch(preference.partition(";")[0]):
            return min(int(found[1]), PREFER_WAIT_MAX_S)
    return None
