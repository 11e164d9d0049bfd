"""A job that kills whatever runs it is found and fails; those beside it end well, and nothing is published twice."""

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.contract import Event, EventName, JobRecord, JobState, WorkerCapability
from omnirt_tasks.jobs.values import JobQuery
from omnirt_tasks.settings import Settings
from tests.support.files import files_in
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.waiting import eventually

LONG_S = 120.0
SETTLES_S = 30.0
POISON = {"steps": 2, "crash_at_step": 1, "crash": "kill"}


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """Two devices on this host; the placement is the test's parameter."""
    return settings.model_copy(update={"cpu_devices": 2, "placement": getattr(request, "param", "process")})


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    system = JobSystem(settings)
    yield system
    system.close()


def starts(system: JobSystem, job_id: str) -> list[Event]:
    return system.events(job_id, EventName.JOB_STARTED)


def running_neighbours(system: JobSystem, count: int = 2) -> list[str]:
    """Jobs that a worker has in hand, with a second or two of work left."""
    jobs = [system.submit(steps=100, step_ms=20) for _ in range(count)]
    for job_id in jobs:
        system.seen(job_id, EventName.STAGE_PROGRESS)
    return jobs


def overlaps(system: JobSystem, jobs: Sequence[str]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The pairs of attempts, from the second one of each job on, that ran at the same time, as (start, end)."""
    spans: list[tuple[int, int]] = []
    for job_id in jobs:
        begun: Event | None = None
        for event in system.events(job_id):
            if event.event is EventName.JOB_STARTED:
                begun = event
            elif begun is not None and (event.terminal or event.event is EventName.JOB_REQUEUED):
                if begun.data["attempt"] != 1:
                    spans.append((begun.timestamp_ms, event.timestamp_ms))
                begun = None
    return [(one, next_one) for one, next_one in pairwise(sorted(spans)) if next_one[0] < one[1]]


def check_poison(system: JobSystem, poison: JobRecord) -> None:
    """It has failed as a dead letter, after three deaths alone and whichever it shared."""
    assert (poison.state, poison.error and poison.error.code) == (JobState.FAILED, "worker_lost")
    assert poison.dead_letter
    assert system.store.get(poison.id).deaths == system.settings.deaths_max
    assert len(system.events(poison.id, EventName.JOB_FAILED)) == 1
    (dead,) = system.store.page(JobQuery(owner="", dead_letters=True)).jobs
    assert dead.record.id == poison.id


def test_a_poison_job_fails_after_its_deaths_alone_and_its_neighbours_end_well_one_at_a_time(
    system: JobSystem, processes: Processes
) -> None:
    worker = processes.worker(system.settings, STUB_QUEUE)
    neighbours = running_neighbours(system)

    poison = system.finished(system.submit(**POISON), LONG_S)  # type: ignore[arg-type]

    check_poison(system, poison)
    assert len(starts(system, poison.id)) == 1 + system.settings.deaths_max, "the death that it shared does not count"
    ended = [system.finished(job_id, LONG_S) for job_id in neighbours]
    assert [(job.state, job.attempt) for job in ended] == [(JobState.SUCCEEDED, 2)] * 2
    assert overlaps(system, [poison.id, *neighbours]) == []
    assert worker.exit_code is None
    assert system.finished(system.submit(), SETTLES_S).state is JobState.SUCCEEDED
    eventually(lambda: system.celery_state(poison.id) == "FAILURE")


@pytest.mark.parametrize("settings", ["thread"], indirect=True)
def test_a_poison_job_that_takes_the_whole_worker_with_it_fails_and_its_neighbours_end_well(
    system: JobSystem, processes: Processes
) -> None:
    workers = [processes.worker(system.settings, STUB_QUEUE) for _ in range(2)]
    neighbours = running_neighbours(system, count=4)  # on both
    job_id = system.submit(**POISON)  # type: ignore[arg-type]

    def over_while_the_dead_are_replaced() -> bool:
        for place, worker in enumerate(workers):
            if worker.exit_code is not None:
                workers[place] = processes.worker(system.settings, STUB_QUEUE)
        return system.job(job_id).finished

    eventually(over_while_the_dead_are_replaced, LONG_S)

    check_poison(system, system.job(job_id))
    ended = [system.finished(neighbour, LONG_S) for neighbour in neighbours]
    assert [job.state for job in ended] == [JobState.SUCCEEDED] * 4
    assert [len(system.events(job.id, EventName.JOB_FINISHED)) for job in ended] == [1] * 4


def both_live(system: JobSystem) -> tuple[WorkerCapability, ...]:
    live = system.fleet.live()
    return live if len(live) == 2 else ()


def kill_group(worker: ChildProcess) -> None:
    os.killpg(worker.pid, signal.SIGKILL)
    eventually(lambda: worker.exit_code is not None)


def test_jobs_whose_worker_is_killed_run_again_one_at_a_time_on_another_and_nobody_is_blamed(
    system: JobSystem, processes: Processes
) -> None:
    worker = processes.worker(system.settings, STUB_QUEUE)
    jobs = running_neighbours(system, count=3)
    processes.worker(system.settings, STUB_QUEUE)

    kill_group(worker)

    ended = [system.finished(job_id, LONG_S) for job_id in jobs]
    assert [(job.state, job.attempt) for job in ended] == [(JobState.SUCCEEDED, 2)] * 3
    assert [system.store.get(job.id).deaths for job in ended] == [0] * 3
    assert overlaps(system, jobs) == []


def test_a_job_that_had_too_little_memory_beside_others_is_tried_alone_before_it_fails(
    system: JobSystem, processes: Processes
) -> None:
    processes.worker(system.settings, STUB_QUEUE)
    (neighbour,) = running_neighbours(system, count=1)
    greedy = system.submit(steps=2, oom_above_chunk=0)

    job = system.finished(greedy, LONG_S)

    assert (job.error and job.error.code, job.attempt, job.dead_letter) == ("out_of_memory", 2, False)
    assert [event.data["reason"] for event in system.events(greedy, EventName.JOB_REQUEUED)] == ["out_of_memory"]
    assert system.finished(neighbour).attempt == 1
    (finished,) = system.events(neighbour, EventName.JOB_FINISHED)
    assert starts(system, greedy)[-1].timestamp_ms >= finished.timestamp_ms, "it waited for the device"


@pytest.mark.parametrize("wakes", ["before the next attempt ends", "after the next attempt has ended"])
@pytest.mark.parametrize("settings", ["thread", "process"], indirect=True)
def test_a_worker_that_was_frozen_past_its_lease_publishes_nothing_when_it_wakes(
    system: JobSystem, processes: Processes, wakes: str
) -> None:
    workers = [processes.worker(system.settings, STUB_QUEUE) for _ in range(2)]
    by_id = {worker.worker_id: os.getpgid(worker.pid) for worker in eventually(lambda: both_live(system), SETTLES_S)}
    (job_id,) = running_neighbours(system, count=1)
    frozen = by_id[str(starts(system, job_id)[0].data["worker_id"])]

    os.killpg(frozen, signal.SIGSTOP)  # in placement `process` its device goes on, and finishes the run
    try:
        eventually(lambda: len(starts(system, job_id)) == 2, SETTLES_S)
        if wakes.startswith("after"):
            system.finished(job_id, SETTLES_S)
    finally:
        os.killpg(frozen, signal.SIGCONT)

    job = system.finished(job_id, SETTLES_S)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert job.worker_id == starts(system, job_id)[1].data["worker_id"] != starts(system, job_id)[0].data["worker_id"]
    result = system.local_file(job)
    assert result is not None
    folder, scratch = result.parent.parent, system.settings.run_dir / "scratch"
    eventually(lambda: not any(scratch.glob("*/*")), told=lambda: str(list(scratch.glob("*/*"))))
    assert [file.relative_to(folder).as_posix() for file in files_in(folder)] == ["2/0.png"]
    assert len(system.events(job_id, EventName.JOB_FINISHED)) == 1
    assert [worker.exit_code for worker in workers] == [None, None]
    later = [system.submit(steps=20, step_ms=20) for _ in range(6)]
    assert {system.finished(late, SETTLES_S).state for late in later} == {JobState.SUCCEEDED}
