"""Workers that leave: each finishes or gives back what it has in hand, and no job is lost or fails by it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.contract import EventName, JobState, WorkerCapability
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.settings import Settings
from tests.support.commands import Command
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes, environment
from tests.support.waiting import eventually

LEAVING = "worker_leaving"


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    system = JobSystem(settings)
    yield system
    system.close()


def omnirt(settings: Settings, *arguments: str, cwd: Path) -> Command:
    """`omnirt ARGUMENTS` with the settings of the test."""
    return Command(*arguments, cwd=cwd, env=environment(settings))


def live(system: JobSystem, workers: int) -> tuple[WorkerCapability, ...]:
    """The workers, once there are as many."""
    return eventually(lambda: found if len(found := system.fleet.live()) == workers else (), 45)


def reasons(system: JobSystem, job_id: str) -> set[str]:
    """Why the job went back to its queue."""
    return {str(event.data["reason"]) for event in system.events(job_id, EventName.JOB_REQUEUED)}


def test_a_rolling_restart_under_load_loses_nothing_and_fails_nothing(system: JobSystem, processes: Processes) -> None:
    settings = system.settings.model_copy(update={"cpu_devices": 2, "grace_s": 0.3})
    workers: list[ChildProcess] = [processes.worker(settings, STUB_QUEUE) for _ in range(2)]
    live(system, 2)
    jobs: list[str] = []

    def load() -> None:
        jobs.extend(system.submit(steps=steps, step_ms=20) for steps in (2, 10, 40, 90))

    for _ in range(5):
        load()
    for number in range(2):
        before = {worker.pid for worker in live(system, 2)}
        leaving = workers[number]
        leaving.ask_to_stop()
        load()
        assert leaving.wait(20)
        assert leaving.exit_code == 0
        load()
        workers[number] = processes.worker(settings, STUB_QUEUE)
        load()
        assert {worker.pid for worker in live(system, 2)} != before

    ends = {job_id: system.finished(job_id, 90) for job_id in jobs}
    assert {job.state for job in ends.values()} == {JobState.SUCCEEDED}
    assert {reason for job_id in jobs for reason in reasons(system, job_id)} <= {LEAVING}
    for job_id in jobs:
        assert len(system.events(job_id, EventName.JOB_FINISHED)) == 1
        assert len(system.events(job_id, EventName.JOB_STARTED)) == ends[job_id].attempt


def test_a_device_call_that_hangs_does_not_keep_a_leaving_worker(system: JobSystem, processes: Processes) -> None:
    settings = system.settings.model_copy(update={"grace_s": 0.2, "cpu_devices": 2})
    leaving = processes.worker(settings, STUB_QUEUE, env={"OMNIRT_PLACEMENT": "process"})
    hung = system.submit(hang_at_step=2, steps=4)
    system.seen(hung, EventName.STAGE_PROGRESS)

    leaving.ask_to_stop()

    assert leaving.wait(30)
    assert leaving.exit_code == 0
    assert reasons(system, hung) == {LEAVING}
    assert system.job(hung).state is JobState.QUEUED
    system.store.cancel(hung)


def test_a_worker_that_is_asked_to_leave_while_redis_is_away_ends_and_its_job_runs_again(
    settings: Settings, processes: Processes, tmp_path: Path
) -> None:
    with EmbeddedBroker(data_dir=tmp_path / "broker") as broker:
        own = settings.model_copy(update={"redis_url": SecretStr(broker.url), "grace_s": 0.2})
        system = JobSystem(own)
        try:
            leaving = processes.worker(own, STUB_QUEUE)
            job_id = system.submit(steps=100, step_ms=20)
            system.seen(job_id, EventName.STAGE_PROGRESS)
            broker.stop()

            leaving.ask_to_stop()

            assert leaving.wait(45)
            assert leaving.exit_code == 0
            broker.start()
            processes.worker(own, STUB_QUEUE)
            assert (system.finished(job_id).state, system.job(job_id).attempt) == (JobState.SUCCEEDED, 2)
        finally:
            system.close()
            processes.stop_all()


def test_a_worker_is_drained_from_afar_and_the_command_ends_when_it_is_gone(
    system: JobSystem, processes: Processes, tmp_path: Path
) -> None:
    worker = processes.worker(system.settings.model_copy(update={"grace_s": 60.0}), STUB_QUEUE)
    (record,) = live(system, 1)
    jobs = [
        system.submit(steps=steps, step_ms=30) for steps in (90, 190)
    ]  # in turns; the command takes a while to start
    for job_id in jobs:
        system.seen(job_id, EventName.STAGE_PROGRESS)

    with omnirt(system.settings, "worker", "drain", "cpu-stub-0", cwd=tmp_path) as drain:
        drain.until(f"{record.worker_id}: 2 jobs in hand")
        later = system.submit()
        drain.until(f"{record.worker_id}: 1 job in hand")
        assert drain.result() == 0
    assert worker.wait(20)
    assert worker.exit_code == 0
    assert {(system.job(job_id).state, system.job(job_id).attempt) for job_id in jobs} == {(JobState.SUCCEEDED, 1)}
    assert not system.events(later, EventName.JOB_STARTED), "a worker that drains takes no more"


def test_a_drain_with_a_grace_of_its_own_gives_back_what_is_not_over_by_then(
    system: JobSystem, processes: Processes, tmp_path: Path
) -> None:
    settings = system.settings.model_copy(update={"grace_s": 60.0, "cpu_devices": 2})
    processes.worker(settings, STUB_QUEUE)
    (record,) = live(system, 1)
    job_id = system.submit(steps=200, step_ms=50)
    system.seen(job_id, EventName.STAGE_PROGRESS)

    with omnirt(system.settings, "worker", "drain", record.worker_id, "--grace", "0.2", cwd=tmp_path) as drain:
        assert drain.result() == 0
    assert system.job(job_id).state is JobState.QUEUED
    assert reasons(system, job_id) == {LEAVING}
    system.store.cancel(job_id)


def test_a_second_drain_shortens_the_grace_of_the_first(
    system: JobSystem, processes: Processes, tmp_path: Path
) -> None:
    worker = processes.worker(system.settings.model_copy(update={"grace_s": 60.0}), STUB_QUEUE)
    (record,) = live(system, 1)
    job_id = system.submit(steps=200, step_ms=1_000)
    system.seen(job_id, EventName.STAGE_PROGRESS)

    with omnirt(system.settings, "worker", "drain", record.worker_id, cwd=tmp_path) as patient:
        patient.until(f"{record.worker_id}: 1 job in hand")
        with omnirt(system.settings, "worker", "drain", record.worker_id, "--grace", "0", cwd=tmp_path) as hasty:
            assert hasty.result() == 0
        assert patient.result() == 0

    assert worker.wait(20)
    assert (worker.exit_code, system.job(job_id).state) == (0, JobState.QUEUED)
    assert reasons(system, job_id) == {LEAVING}
    system.store.cancel(job_id)


def test_draining_a_worker_that_is_not_there_names_those_that_are(
    system: JobSystem, processes: Processes, tmp_path: Path
) -> None:
    processes.worker(system.settings, STUB_QUEUE)
    (record,) = live(system, 1)

    with omnirt(system.settings, "worker", "drain", "cuda-7", cwd=tmp_path) as drain:
        assert drain.result() == 2

        assert f"No live worker has the name cuda-7. There are {record.worker_id}." in drain.told()
    assert system.finished(system.submit()).state is JobState.SUCCEEDED


def test_omnirt_worker_without_a_command_runs_one(system: JobSystem, tmp_path: Path) -> None:
    with omnirt(system.settings, "worker", "-Q", STUB_QUEUE, "--hostname", "mine@%h", cwd=tmp_path) as worker:
        (record,) = live(system, 1)
        assert record.worker_id.startswith("mine@")
        assert system.finished(system.submit()).state is JobState.SUCCEEDED
        worker.send(signal.SIGTERM)
        assert worker.result() == 0


def test_a_job_cancelled_in_its_queue_never_runs_though_every_worker_restarts(
    system: JobSystem, processes: Processes
) -> None:
    settings = system.settings.model_copy(update={"concurrency": 1})
    first = processes.worker(settings, STUB_QUEUE)
    (record,) = live(system, 1)
    running = system.submit(steps=200, step_ms=50)
    system.seen(running, EventName.STAGE_PROGRESS)
    cancelled = system.submit()
    system.store.cancel(cancelled)
    system.store.cancel(running)
    os.kill(record.pid, signal.SIGKILL)  # a worker that would have remembered
    assert first.wait(10)
    assert len(system.messages()) == 1, "its message still waits"

    processes.worker(settings, STUB_QUEUE)

    assert system.finished(running).state is JobState.CANCELLED
    eventually(lambda: not system.messages())
    assert system.finished(system.submit()).state is JobState.SUCCEEDED
    assert not system.events(cancelled, EventName.JOB_STARTED)
    assert system.job(cancelled).state is JobState.CANCELLED
