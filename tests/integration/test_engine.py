"""OmniEngine: jobs in this process."""

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import CancelOutcome, EventName, JobRecord, JobState
from omnirt_tasks.errors import (
    BackendUnsupported,
    ConfigurationError,
    JobNotFound,
    JobTimeout,
    StorageError,
    ValidationFailed,
)
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.values import NewJob, StoredJob
from omnirt_tasks.settings import Settings, load_settings
from omnirt_tasks.validation import Resolution, parse_request, resolve
from tests.support.waiting import eventually
from workers.backends import DeviceInfo
from workers.backends.cpu import CpuDriver
from workers.engine import OmniEngine


@pytest.fixture
def engine() -> Iterator[OmniEngine]:
    with OmniEngine(backend="cpu-stub") as engine:
        yield engine


def submit(
    engine: OmniEngine, *, steps: int = 2, backend: str = "cpu-stub", deadline_s: float | None = None, **config: object
) -> JobRecord:
    body = {
        "task": "text2image",
        "model": "stub",
        "backend": backend,
        "inputs": {"prompt": "a red circle"},
        "config": {"num_inference_steps": steps, **config},
        "deadline_s": deadline_s,
    }
    return engine.submit(parse_request(body))


def test_a_job_runs_to_local_files(engine: OmniEngine) -> None:
    job = engine.wait(submit(engine, num_images_per_prompt=2, seed=5).id, timeout_s=30)

    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert [output.seed for output in job.result.outputs] == [5, 6]
    for output in job.result.outputs:
        assert output.url is None
        assert Path(output.path).read_bytes().startswith(b"\x89PNG")
        assert Path(output.path).stat().st_size == output.size_bytes
    assert job.result.metadata.batch_size == 1


def test_its_files_go_to_the_folder_that_was_named_and_stay_there(tmp_path: Path) -> None:
    with OmniEngine(backend="cpu-stub", output_dir=tmp_path / "out") as engine:
        job = engine.wait(submit(engine).id, timeout_s=30)

    assert job.result is not None
    path = Path(job.result.outputs[0].path)
    assert path.is_relative_to(tmp_path / "out")
    assert path.is_file()


def test_its_own_folder_goes_with_it() -> None:
    with OmniEngine(backend="cpu-stub") as engine:
        job = engine.wait(submit(engine).id, timeout_s=30)

    assert job.result is not None
    assert not Path(job.result.outputs[0].path).exists()


def test_no_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the engine opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    settings = load_settings(redis_url="redis://127.0.0.1:1/0")

    with OmniEngine(backend="cpu-stub", settings=settings) as engine:
        assert engine.wait(submit(engine).id, timeout_s=30).state is JobState.SUCCEEDED


def test_its_events_come_in_order_and_end_with_the_terminal_one(engine: OmniEngine) -> None:
    job = submit(engine, steps=5, step_ms=5)

    events = list(engine.events(job.id, timeout_s=30))

    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.event for event in events if event.terminal] == [EventName.JOB_FINISHED]
    assert events[-1].terminal
    assert [event.data["step"] for event in events if event.event is EventName.STAGE_PROGRESS] == [1, 2, 3, 4, 5]


def test_a_running_job_is_cancelled_at_its_next_step(engine: OmniEngine) -> None:
    job = submit(engine, steps=200, step_ms=20)
    eventually(lambda: engine.job(job.id).progress)

    assert engine.cancel(job.id) is CancelOutcome.REQUESTED

    assert engine.wait(job.id, timeout_s=5).state is JobState.CANCELLED
    assert engine.cancel(job.id) is CancelOutcome.ALREADY_FINISHED


def test_no_more_jobs_run_at_once_than_allowed_and_a_waiting_one_is_cancelled_at_once() -> None:
    with OmniEngine(max_concurrency=1, backend="cpu-stub") as engine:
        first = submit(engine, steps=100, step_ms=20)
        eventually(lambda: engine.job(first.id).progress)
        second = submit(engine)

        assert engine.job(second.id).state is JobState.QUEUED
        assert engine.cancel(second.id) is CancelOutcome.CANCELLED
        assert engine.wait(second.id, timeout_s=1).state is JobState.CANCELLED
        assert engine.job(first.id).state is JobState.RUNNING


def test_a_failed_job_tells_its_error(engine: OmniEngine) -> None:
    job = engine.wait(submit(engine, fail_at_step=1).id, timeout_s=30)

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "model_failed"


def test_waiting_too_long_is_a_timeout_and_the_job_goes_on(engine: OmniEngine) -> None:
    job = submit(engine, steps=30, step_ms=20)

    with pytest.raises(JobTimeout):
        engine.wait(job.id, timeout_s=0.05)
    with pytest.raises(JobTimeout):
        list(engine.events(job.id, timeout_s=0.05))

    assert engine.wait(job.id, timeout_s=30).state is JobState.SUCCEEDED


def test_what_cannot_run_here_is_refused(engine: OmniEngine) -> None:
    with pytest.raises(ValidationFailed):
        submit(engine, steps=0)
    shapes = {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a red circle"}}
    with pytest.raises(BackendUnsupported):
        engine.submit(parse_request(shapes))
    with pytest.raises(JobNotFound):
        engine.wait("unknown", timeout_s=1)
    with pytest.raises(ConfigurationError):
        OmniEngine(backend="tpu")
    with pytest.raises(ConfigurationError):
        OmniEngine(max_concurrency=0)


def test_a_model_without_weights_here_is_refused_and_auto_takes_what_can_run() -> None:
    with OmniEngine() as engine:
        sdxl = {"task": "text2image", "model": "sdxl-base-1.0", "inputs": {"prompt": "a red circle"}}
        with pytest.raises(BackendUnsupported, match="OMNIRT_MODEL_FOLDERS"):
            engine.submit(parse_request(sdxl))
        assert engine.wait(submit(engine, backend="auto").id, timeout_s=30).backend == "cpu-stub"


def test_a_dtype_that_the_device_does_not_have_is_replaced_before_the_job_runs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_fp32 = (DeviceInfo("cpu:0", "a processor", None, ("fp32",)),)
    monkeypatch.setattr(CpuDriver, "probe", lambda _: only_fp32)
    body = {
        "task": "text2image",
        "model": "shapes",
        "inputs": {"prompt": "a red circle"},
        "config": {"dtype": "bf16", "num_inference_steps": 1},
    }

    with OmniEngine(backend="cpu", settings=settings) as engine:
        job = engine.wait(engine.submit(parse_request(body)).id, timeout_s=60)

    assert job.result is not None, job.error
    report = job.result.metadata
    assert report.config_resolved["dtype"] == "fp32"
    assert any("bf16" in warning for warning in report.warnings)


def test_a_request_is_checked_once(engine: OmniEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []

    def count(*arguments: Any, **options: Any) -> Resolution:
        checked.append(arguments)
        return resolve(*arguments, **options)

    monkeypatch.setattr("omnirt_tasks.submission.resolve", count)

    submit(engine)

    assert len(checked) == 1, "or pictures are decoded twice, and the seed is not the one that was looked at"


def test_a_device_that_cannot_be_taken_fails_the_job_with_the_reason(
    engine: OmniEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigurationError("The device is on fire.", "Put it out.")

    monkeypatch.setattr("workers.engine.driver", refuse)

    job = engine.wait(submit(engine).id, timeout_s=30)

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.message) == (ConfigurationError.code, "The device is on fire.")
    assert [event.event for event in engine.events(job.id) if event.terminal] == [EventName.JOB_FAILED]
    monkeypatch.undo()
    assert engine.wait(submit(engine).id, timeout_s=30).state is JobState.SUCCEEDED


def test_what_another_attempt_may_not_meet_is_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, tries = ArtifactStorage.publish, [StorageError("The outputs could not be stored: it is away.")]

    def refuse_once(artifacts: ArtifactStorage, job_id: str, attempt: int, files: Sequence[Path]) -> None:
        if tries:
            raise tries.pop()
        publish(artifacts, job_id, attempt, files)

    monkeypatch.setattr(ArtifactStorage, "publish", refuse_once)
    quick = settings.model_copy(update={"retry_backoff_s": 0.01})

    with OmniEngine(backend="cpu-stub", settings=quick) as engine:
        job = engine.wait(submit(engine).id, timeout_s=30)

        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
        assert job.result is not None
        assert Path(job.result.outputs[0].path).is_file()


def test_a_job_that_waits_past_its_deadline_fails_in_time() -> None:
    with OmniEngine(max_concurrency=1, backend="cpu-stub") as engine:
        first = submit(engine, steps=200, step_ms=100)
        eventually(lambda: engine.job(first.id).progress)

        job = engine.wait(submit(engine, deadline_s=0.1).id, timeout_s=10)

        assert (job.state, job.error and job.error.code) == (JobState.FAILED, "timeout")
        assert engine.job(first.id).state is JobState.RUNNING


def test_a_job_that_comes_while_the_engine_closes_is_refused_and_does_not_stay_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = OmniEngine(backend="cpu-stub")
    created: list[str] = []
    create = MemoryJobStore.create

    def close_meanwhile(store: MemoryJobStore, job: NewJob, **options: Any) -> StoredJob:
        engine.close()
        created.append(job.id)
        return create(store, job, **options)

    monkeypatch.setattr(MemoryJobStore, "create", close_meanwhile)

    with pytest.raises(ConfigurationError, match="closed"):
        submit(engine)

    assert engine.job(created[0]).state is JobState.CANCELLED


def test_closing_cancels_what_is_not_over(tmp_path: Path) -> None:
    engine = OmniEngine(max_concurrency=1, backend="cpu-stub", output_dir=tmp_path)
    jobs = [submit(engine, steps=200, step_ms=20) for _ in range(3)]
    eventually(lambda: engine.job(jobs[0].id).progress)

    engine.close()
    engine.close()

    assert {engine.job(job.id).state for job in jobs} == {JobState.CANCELLED}
    with pytest.raises(ConfigurationError):
        submit(engine)
