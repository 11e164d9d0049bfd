"""A job in parts, on real workers: many of them make one job, and each part is a Celery task of its own."""

import io
import os
import signal
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.contract import TERMINAL_EVENTS, EventName, JobRecord, JobState, RunReport
from omnirt_tasks.jobs.values import NewJob, part_id
from omnirt_tasks.settings import Settings
from omnirt_tasks.splitting import split
from omnirt_tasks.tasks import GENERATE, send_job
from omnirt_tasks.validation import parse_request
from tests.support.collector import Collector
from tests.support.files import files_in
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.task_events import TaskEvents
from tests.support.waiting import eventually

STEPS = 6
MS = 0.001
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings of two workers on one host, each of which takes two jobs at once."""
    return settings.model_copy(update={"cpu_devices": 2, "concurrency": 2, "retries_max": 0})


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    system = JobSystem(settings)
    yield system
    system.close()


def accept(
    system: JobSystem,
    *,
    per_part: int,
    model: str = "stub",
    backend: str = "cpu-stub",
    prompt: str | list[str] = "a red circle",
    **config: object,
) -> str:
    """A job in parts of so many pictures, as a gateway accepts it, whose messages are not sent yet; its id."""
    body = {"task": "text2image", "model": model, "backend": backend, "inputs": {"prompt": prompt}, "config": config}
    request = parse_request(body)
    resolved, _ = system.submission.check(request, "").unwrap()
    new = NewJob(
        id=str(uuid.uuid4()),
        owner="",
        queue=f"{backend}-{model}",
        request=request.model_dump(mode="json"),
        resolved=resolved,
        traceparent=TRACEPARENT,
        parts=split(resolved, per_part),
    )
    return system.store.create(new).record.id


def send(system: JobSystem, job_id: str, parts: Sequence[int] | None = None) -> None:
    """Put the messages of the job's parts on their queue; of these only, if they are given."""
    job = system.store.get(job_id)
    for number, wake_up in enumerate(job.wake_ups):
        if parts is None or number in parts:
            send_job(system.app, wake_up, traceparent=job.traceparent)


def submit(system: JobSystem, *, pictures: int, per_part: int, **config: object) -> str:
    """A job for the stub in parts, sent; its id."""
    given = {"num_inference_steps": STEPS, "num_images_per_prompt": pictures, "seed": 5, **config}
    job_id = accept(system, per_part=per_part, **given)  # type: ignore[arg-type]
    send(system, job_id)
    return job_id


def succeeded(system: JobSystem, job_id: str) -> JobRecord:
    job = system.finished(job_id, timeout_s=60)
    assert job.state is JobState.SUCCEEDED, job.error
    return job


def outputs(system: JobSystem, job: JobRecord) -> list[bytes]:
    """The job's outputs in order, read from where the store says that they lie."""
    origins = system.store.get(job.id).origins
    assert job.result is not None
    made = []
    for output in job.result.outputs:
        origin = origins[output.name]
        with system.artifacts.open(origin.job_id, origin.attempt, output.name) as stream:
            made.append(stream.read())
    return made


def stored(system: JobSystem) -> list[Path]:
    """Every file of a job that lies in the storage."""
    return files_in(jobs_folder(system))


def jobs_folder(system: JobSystem) -> Path:
    anywhere = system.artifacts.local_path("x", 1, "x")
    assert anywhere is not None
    return anywhere.parents[2]


@dataclass(frozen=True)
class Begun:
    """An attempt of a part, as the job's log tells of its beginning."""

    part: int
    attempt: int
    worker_id: str
    at_ms: int


def begun(system: JobSystem, job_id: str) -> list[Begun]:
    told = []
    for event in system.events(job_id, EventName.PART_STARTED):
        match event.data:
            case {"part": int(part), "attempt": int(attempt), "worker_id": str(worker_id)}:
                told.append(Begun(part, attempt, worker_id, event.timestamp_ms))
    return told


def terminal(system: JobSystem, job_id: str) -> list[EventName]:
    """How the job's log says that it ended; each way once, or it is told twice."""
    return [event.event for event in system.events(job_id) if event.event in TERMINAL_EVENTS]


def test_two_workers_take_the_parts_of_a_job_and_what_they_make_is_one_job(
    system: JobSystem, processes: Processes
) -> None:
    for _ in range(2):
        processes.worker(system.settings, STUB_QUEUE)

    job = succeeded(system, submit(system, pictures=8, per_part=2, step_ms=60))

    attempts = begun(system, job.id)
    assert sorted(each.part for each in attempts) == [0, 1, 2, 3]
    assert len({each.worker_id for each in attempts}) == 2, "both workers take parts"
    assert job.result is not None
    told = [(output.name, output.index, output.seed) for output in job.result.outputs]
    assert told == [(f"{index}.png", index, 5 + index) for index in range(8)]
    assert [output.url for output in job.result.outputs] == [f"/v1/jobs/{job.id}/artifacts/{n}.png" for n in range(8)]
    steps = [event.data for event in system.events(job.id, EventName.STAGE_PROGRESS) if event.stage == "denoise"]
    assert [data["step"] for data in steps] == list(range(1, 4 * STEPS + 1)), "one progress, over all parts"
    assert {data["total"] for data in steps} == {4 * STEPS}
    assert terminal(system, job.id) == [EventName.JOB_FINISHED]
    assert len(system.events(job.id, EventName.JOB_STARTED)) == 1
    for number, part in enumerate(system.store.get(job.id).parts):
        result = system.job(part).result
        assert result is not None
        own = [event.data for event in result.metadata.stream_events if event.event is EventName.STAGE_PROGRESS]
        assert [data["part"] for data in own] == [number] * STEPS, "a part's report tells of its own run"
    whole = succeeded(system, system.submit(steps=STEPS, num_images_per_prompt=8, seed=5))
    assert outputs(system, job) == outputs(system, whole), "picture i is the same, whatever the parts"


def test_one_cancel_stops_every_part_within_a_step_and_nothing_of_them_stays(
    system: JobSystem, processes: Processes
) -> None:
    for _ in range(2):
        processes.worker(system.settings, STUB_QUEUE)
    job_id = submit(system, pictures=5, per_part=1, num_inference_steps=100, step_ms=500)
    eventually(lambda: len(begun(system, job_id)) == 4)
    system.seen(job_id, EventName.STAGE_PROGRESS)

    before = len(system.events(job_id, EventName.STAGE_PROGRESS))
    system.store.cancel(job_id)

    job = system.finished(job_id, timeout_s=10)
    assert job.state is JobState.CANCELLED
    assert terminal(system, job_id) == [EventName.JOB_CANCELLED]
    made = len(system.events(job_id, EventName.STAGE_PROGRESS)) - before
    assert made <= 2 * 4, "each of the four ends the step that it is in, and perhaps one that it has just begun"
    parts = system.store.get(job_id).parts
    assert {system.job(part).state for part in parts} == {JobState.CANCELLED}
    assert succeeded(system, system.submit()).state is JobState.SUCCEEDED, "the workers go on"
    eventually(lambda: {system.celery_state(part) for part in (*parts, job_id)} == {"REVOKED"})
    assert not [file for file in stored(system) if job_id in str(file)]
    assert terminal(system, job_id) == [EventName.JOB_CANCELLED]


@pytest.mark.parametrize("mends", [True, False])
def test_a_part_that_fails_is_tried_again_alone_and_fails_the_job_only_when_that_fails_too(
    system: JobSystem, processes: Processes, mends: bool
) -> None:
    job_id = accept(system, per_part=1, num_inference_steps=STEPS, num_images_per_prompt=3, seed=5, step_ms=50)
    in_the_way = jobs_folder(system) / part_id(job_id, 1)  # a file where the part's outputs are to lie
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.write_text("")
    send(system, job_id)
    processes.worker(system.settings, STUB_QUEUE)

    (requeued,) = eventually(lambda: system.events(job_id, EventName.PART_REQUEUED), 30)
    assert requeued.data == {"part": 1, "attempt": 1, "reason": "storage_error"}
    if mends:
        in_the_way.unlink(missing_ok=True)
    job = system.finished(job_id)

    attempts = [(each.part, each.attempt) for each in begun(system, job_id)]
    assert (attempts[-1], len(attempts)) == ((1, 2), 4), "the part runs once more, when nothing else does"
    if mends:
        assert job.state is JobState.SUCCEEDED
        assert len(outputs(system, job)) == 3
        return
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "storage_error"
    assert job.error.message.startswith("Part 2 of 3, picture 1: ")
    assert terminal(system, job_id) == [EventName.JOB_FAILED]
    eventually(lambda: system.celery_state(job_id) == "FAILURE")
    assert [file for file in stored(system) if job_id in str(file) and file != in_the_way] == []


def test_when_a_worker_dies_only_the_part_that_it_had_in_hand_runs_again(
    system: JobSystem, processes: Processes
) -> None:
    settings = system.settings.model_copy(update={"concurrency": 1})
    for _ in range(2):
        processes.worker(settings, STUB_QUEUE)
    job_id = submit(system, pictures=2, per_part=1, num_inference_steps=20, step_ms=50)
    eventually(lambda: len(begun(system, job_id)) == 2)
    victim, other = begun(system, job_id)
    pids = {worker.worker_id: worker.pid for worker in system.fleet.live()}

    os.kill(pids[victim.worker_id], signal.SIGKILL)

    job = succeeded(system, job_id)
    attempts = {part: system.job(part_id(job_id, part)).attempt for part in (0, 1)}
    assert attempts == {victim.part: 2, other.part: 1}
    assert len(outputs(system, job)) == 2
    assert terminal(system, job_id) == [EventName.JOB_FINISHED]


def test_no_slot_waits_for_parts_so_a_worker_of_one_slot_does_other_jobs_between_them(
    system: JobSystem, processes: Processes
) -> None:
    job_id = accept(system, per_part=1, num_inference_steps=STEPS, num_images_per_prompt=4, seed=5)
    send(system, job_id, parts=(0, 1))
    between = system.submit()
    send(system, job_id, parts=(2, 3))

    processes.worker(system.settings.model_copy(update={"concurrency": 1}), STUB_QUEUE)

    succeeded(system, job_id)
    (lone,) = system.events(between, EventName.JOB_FINISHED)
    at_ms = {each.part: each.at_ms for each in begun(system, job_id)}
    assert at_ms[1] <= lone.timestamp_ms <= at_ms[2], "it came between the parts, and was done there"


def test_each_part_is_a_celery_task_with_true_times_and_celery_tells_of_the_whole_job_too(
    system: JobSystem, processes: Processes
) -> None:
    processes.worker(system.settings, STUB_QUEUE)

    with TaskEvents(system.app) as heard:
        job_id = submit(system, pictures=2, per_part=1, step_ms=50)
        job = succeeded(system, job_id)
        parts = system.store.get(job_id).parts
        heard.until(lambda: all(heard.names(task)[-1:] == ["task-succeeded"] for task in (*parts, job_id)))

    for part in parts:
        assert heard.names(part) == ["task-received", "task-started", "task-succeeded"]
        received, started, ended = heard.times_s(part)
        record = system.job(part)
        assert record.started_at_ms is not None
        assert record.finished_at_ms is not None
        told_s = [
            received,
            started,
            record.started_at_ms / 1000 + MS,
            record.finished_at_ms / 1000 + MS,
            ended + 2 * MS,
        ]
        assert told_s == sorted(told_s), "Celery's times hold those of the record between them"
    state = system.app.events.State()  # what Flower shows
    for event in heard.all:
        state.event(event)
    shown = {task: (state.tasks[task].name, state.tasks[task].state) for task in (*parts, job_id)}
    assert shown == dict.fromkeys((*parts, job_id), (GENERATE, "SUCCESS"))
    assert set(heard.names(job_id)) == {"task-succeeded"}
    event = heard.of(job_id)[0]
    assert job.started_at_ms is not None
    assert job.finished_at_ms is not None
    assert (event["started"], event["timestamp"]) == (job.started_at_ms / 1000, job.finished_at_ms / 1000)
    assert {system.celery_state(task) for task in (*parts, job_id)} == {"SUCCESS"}
    told: Any = system.app.AsyncResult(job_id).result
    assert told["outputs"] == [f"/v1/jobs/{job_id}/artifacts/{index}.png" for index in range(2)]
    unacked = system.redis.hlen(f"{broker_prefix(system.settings)}unacked")
    assert unacked == 0, "every message of a part is acknowledged"


def test_members_of_a_chunk_are_celery_tasks_of_their_own_with_times_of_their_own(
    system: JobSystem, processes: Processes
) -> None:
    processes.worker(system.settings, STUB_QUEUE)

    with TaskEvents(system.app) as heard:
        long = system.submit(steps=30, step_ms=40)
        system.seen(long, EventName.STAGE_PROGRESS)
        short = system.submit(steps=3, step_ms=40)
        reports = [_report(succeeded(system, job_id)) for job_id in (short, long)]
        heard.until(lambda: all(heard.names(job_id)[-1:] == ["task-succeeded"] for job_id in (short, long)))

    (_, begun, ended), (_, long_begun, long_ended) = heard.times_s(short), heard.times_s(long)
    assert long_begun < begun < ended < long_ended, "one that joined later, and left earlier, says so"
    assert [report.batch_size for report in reports] == [2, 2], "they shared forward passes"
    assert reports[0].batch_group_id == reports[1].batch_group_id is not None
    assert reports[1].batch_size_mean < reports[0].batch_size_mean <= 2, "the long one was alone for most of its steps"
    for job_id in (short, long):
        assert heard.names(job_id) == ["task-received", "task-started", "task-succeeded"]
        runtime = heard.of(job_id)[-1]["runtime"]
        assert isinstance(runtime, float)
        assert runtime < long_ended - long_begun + 1


def test_a_worker_shows_what_it_was_told_of_sharing(system: JobSystem, processes: Processes) -> None:
    processes.worker(system.settings.model_copy(update={"max_batch_size": 3, "batch_window_ms": 20.0}), STUB_QUEUE)

    inspect = system.app.control.inspect(timeout=1)
    told = eventually(lambda: inspect.registered("max_batch_size", "batch_window_ms"), 60.0)

    assert told is not None
    (tasks,) = told.values()
    assert "omnirt.generate [max_batch_size=3 batch_window_ms=20.0]" in tasks


def test_each_part_has_a_span_of_its_own_in_the_trace_of_its_job(system: JobSystem, processes: Processes) -> None:
    with Collector() as collector:
        settings = system.settings.model_copy(update={"otlp_endpoint": collector.endpoint})
        processes.worker(settings, STUB_QUEUE)
        job_id = submit(system, pictures=2, per_part=1)
        succeeded(system, job_id)
        processes.stop_all()  # which sends what is left

    spans = [span for span in collector.received if span.name == "omnirt.attempt"]
    assert {span.trace_id.hex() for span in spans} == {TRACEPARENT.split("-")[1]}
    attributes = [{each.key: each.value for each in span.attributes} for span in spans]
    assert {each["omnirt.job_id"].string_value for each in attributes} == {job_id}
    assert sorted(each["omnirt.part"].int_value for each in attributes) == [0, 1]


def test_shapes_draws_the_same_pictures_in_parts_as_in_one_piece(system: JobSystem, processes: Processes) -> None:
    prompts = ["a large red circle on a blue background", "a large green square on a white background"]
    config = {"num_inference_steps": 10, "num_images_per_prompt": 2, "seed": 3}
    ids = [
        accept(system, per_part=per_part, model="shapes", backend="cpu", prompt=prompts, **config)
        for per_part in (1, 4)
    ]
    for job_id in ids:
        send(system, job_id)
    processes.worker(system.settings, "cpu-shapes")

    in_parts, in_one = (_levels(outputs(system, succeeded(system, job_id))) for job_id in ids)

    assert len(in_parts) == 4
    assert np.abs(in_parts - in_one).max() <= 2, "of 256 levels"


def _report(job: JobRecord) -> RunReport:
    assert job.result is not None
    return job.result.metadata


def _levels(pictures: Sequence[bytes]) -> "np.ndarray[Any, np.dtype[np.int16]]":
    opened = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in opened])
