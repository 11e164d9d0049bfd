"""The bare command, `celery -A omnirt_tasks worker -Q cpu-stub-stub`, as a process on a real broker."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from omnirt_tasks.contract import CancelOutcome, EventName, JobState
from omnirt_tasks.errors import ModelFailed, ValidationFailed
from omnirt_tasks.settings import Settings, load_settings
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import PROJECT, Processes, environment, free_port
from tests.support.waiting import eventually

TASK_EVENTS = ("received", "started", "succeeded", "failed", "revoked", "retried", "rejected")
SECRET = "a prompt that nobody else may see"


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    """A system of the test's own, without a worker."""
    system = JobSystem(settings)
    yield system
    system.close()


@pytest.fixture(scope="module")
def served(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobSystem]:
    """A system with one bare worker, which all tests share that leave it as it was."""
    folder = tmp_path_factory.mktemp("served")
    settings = load_settings(
        redis_url=redis_url,
        key_prefix=f"served{uuid.uuid4().hex[:8]}",
        data_dir=folder / "data",
        run_dir=folder / "run",
        lease_ttl_s=1.5,
        reconcile_every_s=0.2,
        unclaimed_after_s=1.0,
        heartbeat_s=0.3,
        grace_s=1.0,
    )
    processes, system = Processes(), JobSystem(settings)
    try:
        processes.worker(settings, STUB_QUEUE)
        yield system
    finally:
        system.close()
        processes.stop_all()


def celery(
    settings: Settings, *arguments: str, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """One `celery -A omnirt_tasks …` command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "omnirt_tasks", *arguments],
        env=environment(settings, **(env or {})),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_bare_worker_runs_a_job_and_tells_celery_so(served: JobSystem) -> None:
    job = served.finished(served.submit(steps=3))

    assert job.state is JobState.SUCCEEDED
    assert job.attempt == 1
    assert job.worker_id is not None
    assert job.worker_id.startswith("cpu-stub-0@")
    file = served.local_file(job)
    assert file is not None
    assert file.read_bytes().startswith(b"\x89PNG")
    eventually(lambda: served.celery_state(job.id) == "SUCCESS")
    told = celery(served.settings, "result", job.id)
    assert told.returncode == 0, told.stderr
    assert f"/v1/jobs/{job.id}/artifacts/0.png" in told.stdout


def test_the_report_tells_how_the_job_ran(served: JobSystem) -> None:
    job = served.finished(served.submit(steps=12, seed=7))

    assert job.result is not None
    report, output = job.result.metadata, job.result.outputs[0]
    assert report.job_id == job.id
    assert report.run_id == f"{job.id}.1"
    assert report.worker_id == job.worker_id
    assert report.config_resolved["seed"] == 7
    assert output.seed == 7
    assert report.queue_wait_ms is not None
    assert set(report.timings) == {"load", "encode_prompt", "denoise", "decode", "export"}
    assert [entry.stage for entry in report.backend_timeline] == list(report.timings)
    assert report.memory["peak_mb"] > 0
    assert report.device_placement
    logged = {event.seq: event for event in served.events(job.id)}
    assert all(logged[event.seq] == event for event in report.stream_events)
    steps = [event.data["step"] for event in report.stream_events if event.event is EventName.STAGE_PROGRESS]
    assert steps == list(range(1, 13))
    assert served.events(job.id, EventName.PREVIEW), "previews are told live"
    assert not [event for event in report.stream_events if event.event is EventName.PREVIEW]


def test_the_message_holds_the_jobs_id_and_nothing_of_its_request(system: JobSystem) -> None:
    job_id = system.submit(prompt=SECRET)

    (raw,) = system.messages()

    message = json.loads(raw)
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[job_id], {}]
    assert message["headers"]["id"] == job_id
    assert SECRET not in raw
    assert SECRET not in base64.b64decode(message["body"]).decode()


def test_a_failed_job_is_a_failure_to_celery_without_its_prompt(served: JobSystem) -> None:
    job = served.finished(served.submit(prompt=SECRET, fail_at_step=1))

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "model_failed"
    eventually(lambda: served.celery_state(job.id) == "FAILURE")
    error = served.app.AsyncResult(job.id).result
    assert isinstance(error, ModelFailed)
    assert error.message == job.error.message
    assert SECRET not in celery(served.settings, "result", job.id, "--traceback").stdout
    assert served.finished(served.submit()).state is JobState.SUCCEEDED


def test_ping_and_active_answer_while_a_job_runs(served: JobSystem) -> None:
    job_id = served.submit(prompt=SECRET, steps=200, step_ms=50)
    served.seen(job_id, EventName.STAGE_PROGRESS)

    assert "pong" in celery(served.settings, "inspect", "ping").stdout
    active = celery(served.settings, "inspect", "active", "--json").stdout

    assert job_id in active
    assert SECRET not in active
    served.store.cancel(job_id)
    assert served.finished(job_id).state is JobState.CANCELLED


def test_flower_sees_each_job_as_an_ordinary_task_without_its_prompt(served: JobSystem) -> None:
    seen: dict[str, list[str]] = {}
    texts: list[str] = []

    def note(event: dict[str, Any]) -> None:
        seen.setdefault(event["uuid"], []).append(event["type"])
        texts.append(json.dumps(event, default=str))

    with served.app.connection() as connection:
        receiver = served.app.events.Receiver(connection, handlers={f"task-{name}": note for name in TASK_EVENTS})
        with receiver.consumer_context() as (consuming, _channel, _consumers):
            with contextlib.suppress(TimeoutError):
                consuming.drain_events(timeout=0.5)  # from here on nothing is missed
            good = served.submit(prompt=SECRET)
            bad = served.submit(prompt=SECRET, fail_at_step=1)
            cancelled = served.submit(prompt=SECRET, steps=200, step_ms=20)
            served.seen(cancelled, EventName.STAGE_PROGRESS)
            served.store.cancel(cancelled)
            ends = {good: "task-succeeded", bad: "task-failed", cancelled: "task-revoked"}
            deadline = time.monotonic() + 20
            while not all(end in seen.get(job_id, ()) for job_id, end in ends.items()):
                assert time.monotonic() < deadline, seen
                with contextlib.suppress(TimeoutError):
                    consuming.drain_events(timeout=0.5)

    for job_id, end in ends.items():
        assert seen[job_id] == ["task-received", "task-started", end]
    assert SECRET not in "".join(texts)


def test_a_job_cancelled_while_it_waits_never_runs_and_is_revoked_to_celery(
    system: JobSystem, processes: Processes
) -> None:
    job_id = system.submit()
    assert system.store.cancel(job_id) is CancelOutcome.CANCELLED

    processes.worker(system.settings, STUB_QUEUE)

    eventually(lambda: system.celery_state(job_id) == "REVOKED")
    assert not system.events(job_id, EventName.JOB_STARTED)


def test_a_running_job_is_cancelled_at_its_next_step_and_harms_no_other(served: JobSystem) -> None:
    doomed, other = served.submit(steps=200, step_ms=30), served.submit(steps=20, step_ms=10)
    served.seen(doomed, EventName.STAGE_PROGRESS)

    assert served.store.cancel(doomed) is CancelOutcome.REQUESTED

    assert served.finished(doomed, timeout_s=5).state is JobState.CANCELLED
    assert len(served.events(doomed, EventName.STAGE_PROGRESS)) < 200
    eventually(lambda: served.celery_state(doomed) == "REVOKED")
    assert served.finished(other).state is JobState.SUCCEEDED
    assert served.store.cancel(doomed) is CancelOutcome.ALREADY_FINISHED


def test_a_job_runs_past_its_limit_and_fails_with_timeout(system: JobSystem, processes: Processes) -> None:
    processes.worker(system.settings.model_copy(update={"job_timeout_s": 0.4}), STUB_QUEUE)

    job = system.finished(system.submit(steps=200, step_ms=20))

    assert job.error is not None
    assert job.error.code == "timeout"
    assert system.finished(system.submit()).state is JobState.SUCCEEDED


def test_a_second_worker_says_who_has_the_device_and_what_to_set(system: JobSystem, processes: Processes) -> None:
    processes.worker(system.settings, STUB_QUEUE)
    eventually(system.fleet.live)

    second = celery(system.settings, "worker", "-Q", STUB_QUEUE)

    assert second.returncode != 0
    (worker,) = system.fleet.live()
    assert f"cpu-stub:0 is taken by process {worker.pid}" in second.stderr
    assert "OMNIRT_CPU_DEVICES" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_worker_counts_its_stages_and_names_the_job_in_its_log_but_never_the_prompt(
    system: JobSystem, processes: Processes
) -> None:
    port = free_port()
    worker = processes.worker(system.settings.model_copy(update={"metrics_port": port}), STUB_QUEUE)

    job = system.finished(system.submit(prompt=SECRET, fail_at_step=2))
    system.finished(system.submit(prompt=SECRET))

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        metrics = answer.read().decode()
    assert 'omnirt_stage_duration_seconds_count{model="stub",stage="denoise"}' in metrics
    assert "omnirt_vram_peak_bytes" in metrics
    assert job.id not in metrics
    log = "\n".join(worker.last_lines)
    assert job.id in log
    assert SECRET not in log


def test_two_bare_workers_of_a_host_take_a_device_each_and_are_two_nodes(
    system: JobSystem, processes: Processes
) -> None:
    settings = system.settings.model_copy(update={"cpu_devices": 2})
    processes.worker(settings, STUB_QUEUE)
    processes.worker(settings, STUB_QUEUE)

    workers = eventually(lambda: workers if len(workers := system.fleet.live()) == 2 else ())

    assert [worker.device for worker in workers] == ["cpu-stub:0", "cpu-stub:1"]
    assert len({worker.worker_id for worker in workers}) == 2
    assert "2 nodes online" in celery(settings, "inspect", "ping").stdout
    os.kill(workers[0].pid, signal.SIGKILL)
    processes.worker(settings, STUB_QUEUE)  # the device of the dead is free at once


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-Q", "default"), "no queue of this project"),
        (("-Q", "cpu-stub-shapes"), "No model lives on the queue"),
        (("-Q", "cpu-stub-stub,cuda-sdxl"), "A worker serves one"),
        (("-Q", "cpu-stub-stub+eu"), "OMNIRT_TAGS"),
        (("-Q", "cuda-sdxl"), "OMNIRT_MODEL_FOLDERS"),
    ],
)
def test_a_worker_that_cannot_serve_its_queues_says_what_to_change(
    system: JobSystem, arguments: tuple[str, ...], told: str
) -> None:
    ended = celery(system.settings, "worker", *arguments)

    assert ended.returncode != 0
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_with_tags_serves_the_queue_of_each_set_of_them(system: JobSystem, processes: Processes) -> None:
    processes.worker(system.settings.model_copy(update={"tags": ("eu", "gold")}), STUB_QUEUE)
    (worker,) = eventually(system.fleet.live)
    own = {STUB_QUEUE, f"{STUB_QUEUE}+eu", f"{STUB_QUEUE}+gold", f"{STUB_QUEUE}+eu+gold"}
    of_device = {"+".join([STUB_QUEUE, "cpu-stub-0", *tags]) for tags in ((), ("eu",), ("gold",), ("eu", "gold"))}
    assert set(worker.queues) == own | of_device
    body = {
        "task": "text2image",
        "model": "stub",
        "backend": "cpu-stub",
        "inputs": {"prompt": "x"},
        "tags": ["gold", "eu"],
    }
    from omnirt_tasks.validation import parse_request

    job_id = system.submission.submit(parse_request(body), owner="").record.id

    assert system.finished(job_id).state is JobState.SUCCEEDED


def test_a_job_that_names_a_device_runs_there_and_its_report_says_so(system: JobSystem, processes: Processes) -> None:
    settings = system.settings.model_copy(update={"cpu_devices": 2})
    for _ in range(2):
        processes.worker(settings, STUB_QUEUE)
    eventually(lambda: len(system.fleet.live()) == 2)

    jobs = [system.finished(system.submit(device="cpu-stub:1")) for _ in range(4)]

    assert {str(job.worker_id).partition("@")[0] for job in jobs} == {"cpu-stub-1"}
    for job in jobs:
        assert job.result is not None
        assert job.result.metadata.config_resolved["device"] == "cpu-stub:1"
    with pytest.raises(ValidationFailed, match="No live worker has the device cpu-stub:7; there are"):
        system.submit(device="cpu-stub:7")
    anywhere = system.finished(system.submit())
    assert anywhere.result is not None
    assert anywhere.result.metadata.config_resolved["device"] in {"cpu-stub:0", "cpu-stub:1"}, "where it ran"


def test_a_worker_that_is_asked_to_leave_gives_its_jobs_back_and_exits_0(
    system: JobSystem, processes: Processes
) -> None:
    settings = system.settings.model_copy(update={"grace_s": 0.2})
    leaving = processes.worker(settings, STUB_QUEUE)
    jobs = [system.submit(steps=30, step_ms=20) for _ in range(3)]
    for job_id in jobs:
        system.seen(job_id, EventName.STAGE_PROGRESS)

    leaving.ask_to_stop()

    assert leaving.wait(10)
    assert leaving.exit_code == 0
    assert {system.job(job_id).state for job_id in jobs} == {JobState.QUEUED}
    assert {system.celery_state(job_id) for job_id in jobs} == {"RETRY"}
    assert len(system.messages()) == len(jobs)
    processes.worker(settings, STUB_QUEUE)
    for job_id in jobs:
        job = system.finished(job_id)
        assert job.state is JobState.SUCCEEDED
        assert job.attempt == 2
        (requeued,) = system.events(job_id, EventName.JOB_REQUEUED)
        assert requeued.data == {"attempt": 1, "reason": "worker_leaving"}
        eventually(lambda job_id=job_id: system.celery_state(job_id) == "SUCCESS")  # type: ignore[misc]


@pytest.mark.parametrize("how", ["SIGQUIT", "control command"])
def test_however_a_worker_is_stopped_its_job_runs_again(system: JobSystem, processes: Processes, how: str) -> None:
    settings = system.settings.model_copy(update={"grace_s": 0.2})
    stopped = processes.worker(settings, STUB_QUEUE)
    (worker,) = eventually(system.fleet.live)
    job_id = system.submit(steps=30, step_ms=20)
    system.seen(job_id, EventName.STAGE_PROGRESS)

    if how == "SIGQUIT":
        os.kill(worker.pid, signal.SIGQUIT)
    else:
        system.app.control.shutdown()

    assert stopped.wait(10)
    processes.worker(settings, STUB_QUEUE)
    job = system.finished(job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    (requeued,) = system.events(job_id, EventName.JOB_REQUEUED)
    assert requeued.data["reason"] == "worker_leaving"


def test_a_leaving_worker_lets_short_jobs_finish_and_withdraws_at_once(system: JobSystem, processes: Processes) -> None:
    leaving = processes.worker(system.settings.model_copy(update={"grace_s": 20.0}), STUB_QUEUE)
    eventually(system.fleet.live)
    job_id = system.submit(steps=50, step_ms=20)
    system.seen(job_id, EventName.STAGE_PROGRESS)

    leaving.ask_to_stop()

    eventually(lambda: not system.fleet.live())
    assert not system.job(job_id).finished
    job = system.finished(job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    assert leaving.wait(10)
    assert leaving.exit_code == 0


def test_a_worker_that_is_killed_leaves_its_job_to_another(system: JobSystem, processes: Processes) -> None:
    settings = system.settings.model_copy(update={"cpu_devices": 2})
    for _ in range(2):
        processes.worker(settings, STUB_QUEUE)
    workers = eventually(lambda: workers if len(workers := system.fleet.live()) == 2 else ())
    job_id = system.submit(steps=60, step_ms=20)
    holder = system.seen(job_id, EventName.JOB_STARTED).data["worker_id"]
    system.seen(job_id, EventName.STAGE_PROGRESS)

    (doomed,) = [worker for worker in workers if worker.worker_id == holder]
    os.kill(doomed.pid, signal.SIGKILL)

    job = system.finished(job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert [event.data["reason"] for event in system.events(job_id, EventName.JOB_REQUEUED)] == ["lease_expired"]
    assert len(system.events(job_id, EventName.JOB_FINISHED)) == 1


def test_a_job_that_hangs_in_the_device_times_out_and_the_worker_ends_loudly(
    system: JobSystem, processes: Processes
) -> None:
    settings = system.settings.model_copy(update={"cpu_devices": 2, "job_timeout_s": 1.0})
    hanging = processes.worker(settings, STUB_QUEUE)
    hung = system.submit(hang_at_step=2)
    system.seen(hung, EventName.STAGE_PROGRESS)
    neighbour = system.submit(steps=2)
    system.seen(neighbour, EventName.JOB_STARTED)
    processes.worker(system.settings.model_copy(update={"cpu_devices": 2}), STUB_QUEUE)

    job = system.finished(hung)

    assert job.error is not None
    assert job.error.code == "timeout"
    assert hanging.wait(30)
    assert hanging.exit_code not in {0, None}
    assert system.finished(neighbour).finished
    assert system.finished(system.submit()).state is JobState.SUCCEEDED
