"""In what order waiting jobs begin, on a real broker with a real worker that runs one at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from omnirt_tasks.contract import EventName, JobState, Priority
from omnirt_tasks.settings import Settings
from omnirt_tasks.validation import parse_request
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.waiting import eventually

ONE_AT_A_TIME = ("-c", "1")
TAG = "eu"


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    """A system of the test's own, without a worker."""
    system = JobSystem(settings)
    yield system
    system.close()


def submit(
    system: JobSystem, priority: Priority = Priority.NORMAL, *tags: str, steps: int = 2, step_ms: float = 5.0
) -> str:
    body = {
        "task": "text2image",
        "model": "stub",
        "backend": "cpu-stub",
        "inputs": {"prompt": f"{priority} {tags}"},
        "config": {"num_inference_steps": steps, "step_ms": step_ms},
        "priority": str(priority),
        "tags": list(tags),
    }
    return system.submission.submit(parse_request(body), owner="").record.id


def begun_at_ms(system: JobSystem, job_id: str) -> int:
    began_at_ms = system.finished(job_id).started_at_ms
    assert began_at_ms is not None
    return began_at_ms


def in_order_of_beginning(system: JobSystem, jobs: list[str]) -> list[str]:
    """The jobs, once all are over."""
    return sorted(jobs, key=lambda job_id: begun_at_ms(system, job_id))


def test_whatever_queue_they_wait_in_high_ones_go_before_normal_ones_and_low_ones_last_the_older_first(
    system: JobSystem, processes: Processes
) -> None:
    given: dict[tuple[Priority, tuple[str, ...]], list[str]] = {}
    for _ in range(2):
        for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH):
            for tags in ((), (TAG,)):
                given.setdefault((priority, tags), []).append(submit(system, priority, *tags))

    processes.worker(system.settings.model_copy(update={"tags": (TAG,)}), STUB_QUEUE, arguments=ONE_AT_A_TIME)

    began = in_order_of_beginning(system, [job_id for jobs in given.values() for job_id in jobs])
    priority_of = {job_id: priority for (priority, _), jobs in given.items() for job_id in jobs}
    assert [priority_of[job_id] for job_id in began] == [Priority.HIGH] * 4 + [Priority.NORMAL] * 4 + [Priority.LOW] * 4
    for jobs in given.values():
        assert [job_id for job_id in began if job_id in jobs] == jobs, "the older first"


def test_a_high_job_that_comes_last_is_the_next_to_begin(system: JobSystem, processes: Processes) -> None:
    processes.worker(system.settings, STUB_QUEUE, arguments=ONE_AT_A_TIME)
    running = submit(system, steps=200, step_ms=50)
    system.seen(running, EventName.STAGE_PROGRESS)
    waiting = [submit(system) for _ in range(3)]

    urgent = submit(system, Priority.HIGH)

    assert {system.job(job_id).state for job_id in (*waiting, urgent)} == {JobState.QUEUED}, "nothing waits inside"
    assert [system.store.position(job_id) for job_id in (urgent, *waiting)] == [1, 2, 3, 4]
    system.store.cancel(running)
    assert in_order_of_beginning(system, [*waiting, urgent]) == [urgent, *waiting]


def test_of_one_priority_the_queues_of_a_worker_take_turns(system: JobSystem, processes: Processes) -> None:
    plain, tagged = [submit(system) for _ in range(4)], [submit(system, Priority.NORMAL, TAG) for _ in range(4)]

    processes.worker(system.settings.model_copy(update={"tags": (TAG,)}), STUB_QUEUE, arguments=ONE_AT_A_TIME)

    first_four = in_order_of_beginning(system, plain + tagged)[:4]
    assert len(set(first_four) & set(plain)) == 2
    assert len(set(first_four) & set(tagged)) == 2


def test_a_low_job_under_an_endless_stream_of_high_ones_begins_once_it_has_waited_long_enough(
    settings: Settings, processes: Processes
) -> None:
    system = JobSystem(settings.model_copy(update={"promote_after_s": 0.7}))
    try:
        processes.worker(system.settings, STUB_QUEUE, arguments=ONE_AT_A_TIME)
        with stream_of_high_jobs(system) as sent:
            eventually(lambda: len(sent) > 3)
            low = submit(system, Priority.LOW)

            begun = system.seen(low, EventName.JOB_STARTED)

            waited_ms = begun.timestamp_ms - system.job(low).enqueued_at_ms
            assert waited_ms > 1_400, "it was overtaken until it had been promoted twice"
            eventually(lambda: system.job(low).state is JobState.SUCCEEDED)
            assert any(system.job(job_id).state is JobState.QUEUED for job_id in sent[-2:]), "while others waited"
        assert system.job(low).priority is Priority.LOW, "what the caller asked for"
    finally:
        system.close()


@contextmanager
def stream_of_high_jobs(system: JobSystem) -> Iterator[list[str]]:
    """Jobs that come as fast as the worker runs them: two always wait."""
    sent: list[str] = []
    over = threading.Event()

    def keep_on() -> None:
        while not over.is_set():
            if system.store.depth(STUB_QUEUE).waiting < 3:
                sent.append(submit(system, Priority.HIGH, step_ms=20))
            else:
                over.wait(0.005)

    stream = threading.Thread(target=keep_on)
    stream.start()
    try:
        yield sent
    finally:
        over.set()
        stream.join()
