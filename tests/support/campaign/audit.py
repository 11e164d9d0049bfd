"""What was promised, looked at from outside once a campaign is over: over HTTP, in Redis, and on the disk."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.client import Client
from omnirt_tasks.contract import CancelOutcome, Event, EventName, JobRecord, JobState
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.settings import Settings
from tests.support.campaign.driver import Story
from tests.support.campaign.plan import Kind
from tests.support.files import files_in

# What a job may end with, by what it was there for, whatever was done to the system.
ENDS = {
    Kind.QUICK: {JobState.SUCCEEDED},
    Kind.SLOW: {JobState.SUCCEEDED},
    Kind.DRAWING: {JobState.SUCCEEDED},
    Kind.FAILING: {JobState.FAILED},
    Kind.CRASHING: {JobState.SUCCEEDED},
    Kind.CANCELLED: {JobState.CANCELLED, JobState.SUCCEEDED},
    Kind.SPLIT: {JobState.SUCCEEDED},
    Kind.SPLIT_CANCELLED: {JobState.CANCELLED, JobState.SUCCEEDED},
    Kind.TIGHT: {JobState.SUCCEEDED},
}
# Errors that the faults explain: a disk that stayed full for every try, and a killer that met the same lone job again.
EXPLAINED = {"storage_error", "worker_lost"}
EXPLAINED_SHARE_MAX = 0.05  # they are rare: where many jobs end so, something else is broken
EXPLAINED_ALWAYS = 2
STAYS = -1  # what Redis tells of a key without an expiry; of one that is gone by now it tells -2
# Few, named, and of a bounded size: what may stay in Redis for good.
PERMANENT = ("serial", "states", "finished", "owner:", "queues", "fleet", "workers", "dead:")
GONE_PREFIXES = ("running:", "waiting:", "sent:", "delayed:", "deadlines")


def complaints(stories: Sequence[Story], settings: Settings, url: str) -> Iterator[str]:
    """Every promise that was not kept; none is the aim."""
    ids = Counter(story.job_id for story in stories)
    explained: Counter[str] = Counter()
    with Client(url, timeout_s=60.0) as client, httpx.Client(base_url=url, timeout=60.0) as http:
        for story in stories:
            name = f"job {story.planned.number} ({story.planned.kind}, {story.job_id})"
            yield from (f"{name}: {said}" for said in story.complaints)
            if story.job_id is None:
                yield f"{name}: never accepted"
                continue
            if ids[story.job_id] > 1:
                yield f"{name}: accepted for two submits"
            job, log = client.job(story.job_id), list(client.events(story.job_id, timeout_s=60.0))
            if (code := _explained(job)) is not None:
                explained[code] += 1
            yield from (f"{name}: {said}" for said in _of_life(story, job, log))
            yield from (f"{name}: {said}" for said in _of_outputs(story, job, http))
        accepted = {story.job_id for story in stories}
        yield from (f"job {job.id}: nobody submitted it" for job in client.jobs() if job.id not in accepted)
    if explained.total() > max(EXPLAINED_ALWAYS, EXPLAINED_SHARE_MAX * len(stories)):
        yield f"more jobs failed than the faults explain: {dict(explained)}"
    yield from leftovers(settings)


def _explained(job: JobRecord) -> str | None:
    """The code that the job failed with, if a fault may be the cause."""
    code = job.error.code if job.error is not None else None
    return code if job.state is JobState.FAILED and code in EXPLAINED else None


def _of_life(story: Story, job: JobRecord, log: Sequence[Event]) -> Iterator[str]:
    code = job.error.code if job.error is not None else None
    if job.state not in ENDS[story.planned.kind] and _explained(job) is None:
        yield f"ended {job.state} ({job.error})"
    if story.planned.kind is Kind.FAILING and code not in {"model_failed", *EXPLAINED}:
        yield f"failed with {code}"
    if [event.seq for event in log] != list(range(1, len(log) + 1)):
        yield f"its log has gaps: {[event.seq for event in log]}"
    if [event.terminal for event in log].count(True) != 1 or not log[-1].terminal:
        yield f"its log does not end once: {[event.event for event in log if event.terminal]}"
    yield from _of_attempts(job, log)
    if story.cancelled is CancelOutcome.CANCELLED and job.state is not JobState.CANCELLED:
        yield f"was cancelled while it waited, and ended {job.state}"
    if story.seen and [event.seq for event in story.seen] != [event.seq for event in log]:
        yield f"its watcher saw {[event.seq for event in story.seen]} of {len(log)} events"


def _of_attempts(job: JobRecord, log: Sequence[Event]) -> Iterator[str]:
    started = [event.data["attempt"] for event in log if event.event is EventName.JOB_STARTED]
    if job.parts is None:
        if started != list(range(1, job.attempt + 1)):
            yield f"attempts {started} were started, and the record says {job.attempt}"
        return
    if len(started) > 1:
        yield f"a job of parts was started {len(started)} times"
    by_part: dict[object, list[object]] = {}
    for event in log:
        if event.event is EventName.PART_STARTED:
            by_part.setdefault(event.data["part"], []).append(event.data["attempt"])
    for part, attempts in by_part.items():
        if attempts != list(range(1, len(attempts) + 1)):
            yield f"attempts {attempts} of its part {part} were started"
    most = max(map(len, by_part.values()), default=0)
    if most != job.attempt:
        yield f"a part was started {most} times, and the record says {job.attempt}"
    finished = [event.data["part"] for event in log if event.event is EventName.PART_FINISHED]
    if len(set(finished)) != len(finished):
        yield f"a part finished twice: {finished}"


def _of_outputs(story: Story, job: JobRecord, http: httpx.Client) -> Iterator[str]:
    if job.state is not JobState.SUCCEEDED:
        return
    if job.result is None or not job.result.outputs:
        yield "succeeded without a result"
        return
    planned = story.planned
    outputs = [(output.index, output.seed) for output in job.result.outputs]
    if outputs != [(picture, planned.number + picture) for picture in range(planned.pictures)]:
        yield f"{planned.pictures} pictures were asked for, and its outputs are {outputs}"
    report = job.result.metadata
    if job.parts is None and (report.attempts, report.worker_id) != (job.attempt, job.worker_id):
        # Two attempts give the same picture, so nothing but this tells that one published which had lost its lease.
        yield f"attempt {report.attempts} ({report.worker_id}) published, and {job.attempt} ({job.worker_id}) held it"
    for output in job.result.outputs:
        body = http.get(output.path)
        if body.status_code != 200 or hashlib.sha256(body.content).hexdigest() != output.sha256:
            yield f"{output.name} is not whole ({body.status_code})"


def leftovers(settings: Settings) -> Iterator[str]:
    """What nothing needs any more and nobody will ever remove: in Redis, in the broker, in the storage."""
    client: Any = connect(settings.redis_url)
    broker = broker_prefix(settings)
    try:
        for key in client.scan_iter(match=f"{settings.key_prefix}:*", count=1000):
            name = key.removeprefix(f"{settings.key_prefix}:")
            if name.startswith(GONE_PREFIXES):
                yield f"{key} is left"
            elif key.startswith(broker):
                if client.ttl(key) == STAYS and not key.removeprefix(broker).startswith("_kombu.binding"):
                    yield f"{key} is left, without an expiry"
            elif client.ttl(key) == STAYS and not name.startswith(PERMANENT):
                yield f"{key} has no expiry"
        jobs = {
            key.rpartition(":")[2]: client.hmget(key, "state", "attempt")
            for key in client.scan_iter(match=f"{settings.key_prefix}:job:*", count=1000)
        }
    finally:
        client.close()
    folder = settings.data_dir / "jobs"
    for file in files_in(folder):
        yield from _of_file(file.relative_to(folder), jobs)


def _of_file(place: Path, jobs: dict[str, list[str]]) -> Iterator[str]:
    job_id, attempt = place.parts[0], place.parts[1]
    if job_id not in jobs:
        yield f"{place} belongs to no job"
    elif jobs[job_id] != ["succeeded", attempt] or len(place.parts) != 3:
        yield f"{place} belongs to no attempt that counts ({jobs[job_id]})"
    elif jobs[whole := job_id.partition(".")[0]][0] != "succeeded":
        yield f"{place} belongs to a part of a job that is {jobs[whole][0]}"
