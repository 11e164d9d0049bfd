"""From a body to an accepted job, for every route that takes one."""

import re
from dataclasses import replace

from flask import Response, request

from omnirt_tasks.contract import GenerateRequest, Problem
from omnirt_tasks.errors import (
    BackendUnsupported,
    IdempotencyMismatch,
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
from omnirt_tasks.jobs.watch import wait_finished
from omnirt_tasks.submission import Submitted
from omnirt_tasks.validation import parse_request, shown
from web import errors
from web.answers import job_url, json_answer, record_of
from web.auth import current_owner
from web.bodies import read_body
from web.operations import Parameter
from web.services import services

RETRY_AFTER_S = 1
REPLAYED = "Idempotent-Replayed"
KEY_CHARS_MAX = 255
PREFER_WAIT_MAX_S = 60

PREFER = Parameter(
    "Prefer",
    f"`wait=N`: answer 200 with the finished record if the job ends within N seconds (at most {PREFER_WAIT_MAX_S}).",
    where="header",
)

IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "The caller's own name for this submit, 1 to 255 printable ASCII characters: the same key and body again, sent "
    "anywhere and at any time of a day, give the job that the first one made, and `Idempotent-Replayed: true`.",
    where="header",
)

SUBMIT_NOTES = (
    "For text2image `inputs.prompt` may be a list of prompts, each of which gets `config.num_images_per_prompt` "
    "pictures, in order. A job for several pictures may run in parts, on several devices: it has one record, one "
    "progress, one cancel and one result all the same, and picture i is the one that the job's seed plus i gives alone."
)
"""What is said of every route that submits."""

SUBMIT_ERRORS = (
    InvalidJson,
    ValidationFailed,
    BackendUnsupported,
    InsufficientMemory,
    IdempotencyMismatch,
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

_KEY = re.compile(rf"[ -~]{{1,{KEY_CHARS_MAX}}}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
_WAIT = re.compile(r"\s*wait\s*=\s*\"?(\d{1,9})\"?\s*", re.ASCII | re.IGNORECASE)


def read_request() -> GenerateRequest:
    """The request in the body. Raises InvalidJson, ValidationFailed and what else is wrong with it."""
    parts = services()
    return parse_request(read_body(), parts.catalog, parts.submission.door)


def idempotency_key() -> str | None:
    """The caller's key, with or without the quotes that it may stand in; None if he sent none.

    Raises ValidationFailed for one that is none.
    """
    sent = request.headers.get(IDEMPOTENCY_KEY.name)
    if sent is None:
        return None
    key = sent.strip()
    if quoted := _QUOTED.fullmatch(key):
        key = _ESCAPED.sub(r"\1", quoted[1])
    if not _KEY.fullmatch(key):
        told = f"{shown(sent)} is no key; use 1 to {KEY_CHARS_MAX} printable ASCII characters, a UUID for one."
        raise ValidationFailed([Problem(loc=IDEMPOTENCY_KEY.name, rule="form", message=told)])
    return key


def submit(wanted: GenerateRequest, default_key: str | None = None) -> Submitted:
    """Accept the job for the caller, once under the key that he sent or else `default_key`, if there is one.

    Raises like `Submission.submit_once`.
    """
    parts = services()
    key = idempotency_key() or default_key
    attributes = {"omnirt.task": wanted.task, "omnirt.model": wanted.model}
    with parts.tracing.span(
        "omnirt.submit", traceparent=request.headers.get("traceparent"), attributes=attributes
    ) as at:
        door, owner = parts.submission, current_owner()
        if key is None:
            job = door.submit(wanted, owner=owner, trace_id=at.trace_id, traceparent=at.traceparent)
            return Submitted(job, replayed=False)
        return door.submit_once(wanted, key, owner=owner, trace_id=at.trace_id, traceparent=at.traceparent)


def submit_asynchronously(wanted: GenerateRequest) -> Response:
    """Accept the job: 202 and its record, or 200 when the caller prefers to wait and it ends in time."""
    wait_s = _preferred_wait_s()
    if wait_s is None:
        return accepted(submit(wanted))
    parts = services()
    with parts.waits.held(current_owner()):
        made = submit(wanted)
        job_id = made.job.record.id
        try:
            over = wait_finished(parts.store, parts.feed, job_id, timeout_s=wait_s)
            now = parts.store.get(job_id) if over is None else over
        except StoreUnavailable as error:
            return unwatched(made, error)
    answer = accepted(replace(made, job=now), 202 if over is None else 200)
    answer.headers["Preference-Applied"] = f"wait={wait_s}"
    return answer


def unwatched(made: Submitted, error: StoreUnavailable) -> Response:
    """The answer for an accepted job that cannot be waited for any longer: its id must not be lost with that."""
    job_id = made.job.record.id
    told = StoreUnavailable(
        f"{error.message} The job {job_id} was accepted, and goes on.", f"GET {job_url(job_id)} tells of it."
    )
    return errors.answer(told, job_id=job_id, headers=job_headers(made))


def job_headers(made: Submitted) -> dict[str, str]:
    """Where the job is that an answer tells of in other words than its record."""
    return {"X-Omnirt-Job-Id": made.job.record.id, **_headers(made)}


def accepted(made: Submitted, status: int = 202) -> Response:
    """The record of an accepted job, and where it is."""
    headers = _headers(made)
    if status == 202:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return json_answer(record_of(made.job), status, headers)


def _headers(made: Submitted) -> dict[str, str]:
    replayed = {REPLAYED: "true"} if made.replayed else {}
    return {"Location": job_url(made.job.record.id), **replayed}


def _preferred_wait_s() -> int | None:
    """How long the caller prefers to wait, as much of it as is granted; None if he does not say."""
    for preference in ",".join(request.headers.getlist("Prefer")).split(","):
        if found := _WAIT.fullmatch(preference.partition(";")[0]):
            return min(int(found[1]), PREFER_WAIT_MAX_S)
    return None
