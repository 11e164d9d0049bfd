"""The device's process dies in every way that device code has found; the bare worker stays, and its jobs finish."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from omnirt_tasks.contract import CancelOutcome, EventName, JobRecord, JobState
from omnirt_tasks.settings import Settings
from omnirt_tasks.validation import parse_request
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.waiting import eventually
from workers.peer import SILENT_AFTER_S

READY_S = 40.0
SILENCE_S = SILENT_AFTER_S + 1.0  # after this a device process that says nothing is known to hang
CRASHES = ("kill", "segv", "exit", "abort", "memory")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"placement": "process"})


@pytest.fixture
def open_system(settings: Settings) -> Iterator[Callable[..., JobSystem]]:
    """Opens a system whose settings differ in what is named."""
    opened: list[JobSystem] = []

    def open_one(**changed: object) -> JobSystem:
        opened.append(JobSystem(settings.model_copy(update=changed)))
        return opened[-1]

    yield open_one
    for system in opened:
        system.close()


@pytest.fixture
def system(open_system: Callable[..., JobSystem]) -> JobSystem:
    return open_system()


def device_child(system: JobSystem, but: int | None = None) -> psutil.Process:
    """The process of the only worker's device, waited for; not the one with the id `but`."""

    def found() -> psutil.Process | None:
        for capability in system.fleet.live():
            for process in psutil.Process(capability.pid).children(recursive=True):
                command = process.cmdline()
                if command[1:3] == ["-m", "workers.device_child"] and process.pid != but:
                    return process
        return None

    child = eventually(found, READY_S)
    assert child is not None
    return child


def requeues(system: JobSystem, job_id: str) -> list[object]:
    return [event.data["reason"] for event in system.events(job_id, EventName.JOB_REQUEUED)]


@pytest.mark.parametrize("crash", CRASHES)
def test_a_job_that_ends_the_device_process_runs_again_with_its_neighbours(
    system: JobSystem, processes: Processes, crash: str
) -> None:
    worker = processes.worker(system.settings, STUB_QUEUE)
    child = device_child(system)
    neighbours = [system.submit(steps=100, step_ms=20) for _ in range(2)]
    for job_id in neighbours:
        system.seen(job_id, EventName.STAGE_PROGRESS)

    culprit = system.submit(steps=10, step_ms=10, crash_at_step=5, crash=crash, crash_attempts=1)

    jobs = [system.finished(job_id, READY_S) for job_id in (culprit, *neighbours)]
    assert [(job.state, job.attempt) for job in jobs] == [(JobState.SUCCEEDED, 2)] * 3
    # At once, by the worker itself, and not a lease time later by the reconciler.
    assert [requeues(system, job.id) for job in jobs] == [["device_lost"]] * 3
    assert not child.is_running()
    assert worker.exit_code is None
    assert len(system.events(culprit, EventName.JOB_FINISHED)) == 1
    for job in jobs:
        eventually(lambda job_id=job.id: system.celery_state(job_id) == "SUCCESS")  # type: ignore[misc]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT, signal.SIGTERM])
def test_the_worker_answers_while_its_device_process_is_killed_and_starts_anew(
    system: JobSystem, processes: Processes, number: signal.Signals
) -> None:
    processes.worker(system.settings, STUB_QUEUE)
    child = device_child(system)
    job_id = system.submit(steps=50, step_ms=20)
    system.seen(job_id, EventName.STAGE_PROGRESS)

    os.kill(child.pid, number)

    system.seen(job_id, EventName.JOB_REQUEUED)
    assert system.app.control.ping(timeout=2.0), "the worker answers while it has no device"
    job = system.finished(job_id, READY_S)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert device_child(system, but=child.pid).pid != child.pid


def test_a_hang_that_holds_the_interpreter_is_found_by_the_jobs_deadline_and_ended_by_force(
    open_system: Callable[..., JobSystem], processes: Processes
) -> None:
    system = open_system(job_timeout_s=3.0)
    worker = processes.worker(system.settings, STUB_QUEUE)
    child = device_child(system)
    hung = system.submit(steps=6, step_ms=20, crash_at_step=5, crash="hold-gil")
    system.seen(hung, EventName.STAGE_PROGRESS)
    assert system.app.control.ping(timeout=2.0), "the worker answers while its device hangs"

    job = system.finished(hung, READY_S)

    assert (job.state, job.error and job.error.code) == (JobState.FAILED, "timeout")
    assert system.finished(system.submit(), READY_S).state is JobState.SUCCEEDED
    assert not child.is_running()
    assert worker.exit_code is None


def test_a_jobs_own_deadline_ends_it_by_force_where_device_code_hangs(system: JobSystem, processes: Processes) -> None:
    worker = processes.worker(system.settings, STUB_QUEUE)
    device_child(system)
    hung = {"num_inference_steps": 2, "crash_at_step": 1, "crash": "hold-gil"}
    body = {"task": "text2image", "model": "stub", "backend": "cpu-stub", "inputs": {"prompt": "x"}, "config": hung}

    submitted = system.submission.submit(parse_request({**body, "deadline_s": 3.0}), owner="")

    job = system.finished(submitted.record.id, READY_S)
    assert (job.state, job.error and job.error.code, job.attempt) == (JobState.FAILED, "timeout", 1)
    assert job.error is not None
    assert "3 s after it was accepted" in job.error.message
    assert system.finished(system.submit(), READY_S).state is JobState.SUCCEEDED
    assert worker.exit_code is None


def test_a_cancelled_job_that_does_not_listen_is_ended_by_force_after_the_patience(
    open_system: Callable[..., JobSystem], processes: Processes
) -> None:
    system = open_system(stop_patience_s=SILENCE_S)
    processes.worker(system.settings, STUB_QUEUE)
    device_child(system)
    deaf = system.submit(steps=6, step_ms=20, crash_at_step=5, crash="hold-gil")
    eventually(lambda: len(system.events(deaf, EventName.STAGE_PROGRESS)) == 4)
    neighbour = system.submit(steps=2)

    assert system.store.cancel(deaf) is CancelOutcome.REQUESTED

    assert system.finished(deaf, READY_S).state is JobState.CANCELLED
    assert system.finished(neighbour, READY_S).state is JobState.SUCCEEDED


def test_the_devices_of_one_host_die_apart(open_system: Callable[..., JobSystem], processes: Processes) -> None:
    system = open_system(cpu_devices=2)
    for _ in range(2):
        processes.worker(system.settings, STUB_QUEUE)
    eventually(lambda: len(system.fleet.live()) == 2, READY_S)
    spared = [system.submit(steps=100, step_ms=20, device="cpu-stub:0") for _ in range(2)]
    for job_id in spared:
        system.seen(job_id, EventName.STAGE_PROGRESS)

    culprit = system.submit(crash_at_step=1, crash="segv", crash_attempts=1, device="cpu-stub:1")

    job = system.finished(culprit, READY_S)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert [(job.state, job.attempt) for job in map(system.finished, spared)] == [(JobState.SUCCEEDED, 1)] * 2


def test_a_killed_worker_takes_its_device_process_with_it(system: JobSystem, processes: Processes) -> None:
    processes.worker(system.settings, STUB_QUEUE)
    child = device_child(system)
    job_id = system.submit(steps=100, step_ms=20)
    system.seen(job_id, EventName.STAGE_PROGRESS)
    (worker,) = system.fleet.live()

    os.kill(worker.pid, signal.SIGKILL)

    eventually(lambda: not child.is_running())
    processes.worker(system.settings, STUB_QUEUE)
    job = system.finished(job_id, READY_S)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


def test_a_device_process_is_replaced_after_each_job_and_no_job_notices(
    system: JobSystem, processes: Processes
) -> None:
    settings = system.settings.model_copy(update={"recycle_after_jobs": 1})
    processes.worker(settings, STUB_QUEUE)
    first = device_child(system)
    jobs = [system.submit() for _ in range(3)]
    finished = [system.finished(job_id, READY_S) for job_id in jobs]
    assert [(job.state, job.attempt) for job in finished] == [(JobState.SUCCEEDED, 1)] * 3
    assert device_child(system, but=first.pid).pid != first.pid


def test_a_wrong_warm_up_ends_the_worker_before_it_starts_with_the_reason(
    open_system: Callable[..., JobSystem], processes: Processes
) -> None:
    system = open_system(warm_up=("shapes",))
    worker = processes.start_worker(system.settings, STUB_QUEUE)
    assert worker.wait(READY_S)
    assert worker.exit_code not in {0, None}
    assert any("OMNIRT_WARM_UP names shapes" in line for line in worker.last_lines)


def libraries(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def test_the_celery_process_never_loads_torch_and_a_warmed_up_worker_is_announced_warm(
    open_system: Callable[..., JobSystem], processes: Processes
) -> None:
    system = open_system(placement="auto", warm_up=("shapes",))
    worker = processes.worker(system.settings, "cpu-shapes")
    (alive,) = eventually(system.fleet.live, READY_S, told=lambda: "\n".join(worker.last_lines))
    assert alive.loaded == ("shapes",), "ready means warm"

    job = _draw(system)

    assert job.state is JobState.SUCCEEDED, job.error
    assert job.result is not None
    assert job.result.metadata.cache_hits == ("model",)
    child = device_child(system)
    assert "libtorch" in libraries(child.pid)
    assert "libtorch" not in libraries(alive.pid)


def _draw(system: JobSystem) -> JobRecord:
    body = {
        "task": "text2image",
        "model": "shapes",
        "inputs": {"prompt": "a large red circle on a blue background"},
        "config": {"num_inference_steps": 4, "seed": 3},
    }
    return system.finished(system.submission.submit(parse_request(body), owner="").record.id, timeout_s=60)


def test_a_device_that_can_never_start_ends_the_worker_with_the_reason(
    open_system: Callable[..., JobSystem], processes: Processes, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    system = open_system(placement="auto", warm_up=("shapes",), model_folders={"shapes": str(broken)})
    worker = processes.start_worker(system.settings, "cpu-shapes")
    assert worker.wait(READY_S)
    assert worker.exit_code == 1
    assert any("The device cannot be served" in line for line in worker.last_lines)
