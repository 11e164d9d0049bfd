"""What a worker takes: with two real workers on one queue, and jobs that share a device beside jobs that do not."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from omnirt_tasks.contract import EventName, JobState, Phase
from omnirt_tasks.jobs.values import Claim, Requeue
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import Settings
from omnirt_tasks.submission import Submission
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import Door, parse_request
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.waiting import eventually
from workers.context import WAITING

LONG: dict[str, Any] = {"num_inference_steps": 200, "step_ms": 100}


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    """A system of the test's own, on a host with two devices, without a worker.

    Nobody sends a job again that a worker keeps to itself.
    """
    system = JobSystem(settings.model_copy(update={"cpu_devices": 2, "heartbeat_s": 0.2, "unclaimed_after_s": 60.0}))
    yield system
    system.close()


@pytest.fixture
def pair(system: JobSystem, processes: Processes) -> JobSystem:
    """The system with two workers on its queue, which know of each other."""
    for _ in range(2):
        processes.worker(system.settings, STUB_QUEUE)
    eventually(lambda: len(system.fleet.live()) == 2)
    return system


def lone(system: JobSystem, **config: object) -> str:
    """A job that is to have a device to itself, as one is whose device died; its message is sent last."""
    quiet = Submission(
        store=system.store,
        catalog=discover(),
        fleet=system.fleet,
        uploads=UploadStorage(system.settings.storage_url, ttl_s=600, max_bytes=10**6, max_pixels=10**6),
        send=lambda _: None,
        door=Door(),
    )
    body = {
        "task": "text2image",
        "model": "stub",
        "backend": "cpu-stub",
        "inputs": {"prompt": "alone"},
        "config": {"num_inference_steps": 2, **config},
    }
    job_id = quiet.submit(parse_request(body), owner="").record.id
    claim = system.store.claim(job_id, worker_id="before", lease_ttl_ms=60_000)
    assert isinstance(claim, Claim)
    assert system.store.give_back(claim.lease, Requeue("test", alone=True))
    system.send(job_id)
    return job_id


def busy(system: JobSystem, device: int) -> str:
    """A long job in the hand of the device's worker."""
    job_id = system.submit(**LONG, device=f"cpu-stub:{device}")
    system.seen(job_id, EventName.STAGE_PROGRESS)
    return job_id


def in_hand(system: JobSystem) -> dict[str, set[str]]:
    """The jobs whose Celery tasks each worker has, begun or not."""
    active = system.app.control.inspect(timeout=5.0, limit=len(system.fleet.live())).active() or {}
    return {worker: {task["id"] for task in tasks} for worker, tasks in active.items()}


def not_begun(system: JobSystem, jobs: set[str]) -> set[str]:
    return {job_id for job_id in jobs if system.job(job_id).state is JobState.QUEUED}


def test_each_worker_holds_one_job_that_it_cannot_begin_and_the_rest_waits_in_the_queue(pair: JobSystem) -> None:
    running = [busy(pair, device) for device in range(2)]
    alone = [lone(pair) for _ in range(4)]

    eventually(lambda: len(not_begun(pair, set().union(*in_hand(pair).values()))) == 2)
    late = pair.submit()

    for _ in range(10):
        assert all(len(not_begun(pair, jobs)) <= 1 for jobs in in_hand(pair).values())
    assert {pair.job(job_id).state for job_id in (*alone, late)} == {JobState.QUEUED}
    assert pair.celery_state(late) == "PENDING", "it was not even handed to a worker's pool"

    pair.store.cancel(running[0])
    assert pair.finished(late).state is JobState.SUCCEEDED
    (held,) = [job_id for job_id in alone if not pair.job(job_id).finished]
    began = {job_id: pair.job(job_id).started_at_ms or 0 for job_id in (*alone, late) if job_id != held}
    assert max(began, key=lambda job_id: began[job_id]) == late, "it came last"
    pair.store.cancel(running[1])
    assert pair.finished(held).state is JobState.SUCCEEDED


def test_a_worker_that_gets_free_has_all_that_the_other_cannot_begin(pair: JobSystem) -> None:
    ending, lasting = lone(pair, **LONG), lone(pair, **LONG)
    for job_id in (ending, lasting):
        eventually(lambda job_id=job_id: pair.job(job_id).state is JobState.RUNNING)  # type: ignore[misc]
    behind = [lone(pair) for _ in range(4)]

    pair.store.cancel(ending)

    assert {pair.finished(job_id).state for job_id in behind} == {JobState.SUCCEEDED}
    assert pair.job(lasting).state is JobState.RUNNING
    pair.store.cancel(lasting)
    pair.finished(lasting)


def test_a_lone_job_is_begun_in_its_turn_whatever_comes_after_it(system: JobSystem, processes: Processes) -> None:
    processes.worker(system.settings, STUB_QUEUE)
    with stream_of_joiners(system) as stream:
        eventually(lambda: len(stream.sent) > 10)
        job_id = lone(system)
        before = len(stream.sent)

        assert system.finished(job_id).state is JobState.SUCCEEDED
    started_at_ms = system.job(job_id).started_at_ms
    assert started_at_ms is not None
    overtook = [
        joiner
        for joiner in stream.sent[before + 2 :]  # one or two may have been sent while its message was
        if (system.finished(joiner).started_at_ms or 0) < started_at_ms
    ]
    assert not overtook


def test_with_a_mix_of_jobs_no_worker_keeps_a_second_one_that_it_cannot_begin_while_the_other_idles(
    pair: JobSystem,
) -> None:
    rng = random.Random(5)
    jobs = [
        lone(pair, step_ms=rng.randint(20, 300))
        if rng.random() < 0.5
        else pair.submit(steps=rng.randint(2, 20), step_ms=10)
        for _ in range(24)
    ]
    kept_in_a_row = 0
    while not all(pair.job(job_id).finished for job_id in jobs):
        hands = in_hand(pair)
        idle = any(not hand for hand in hands.values())
        keeps = any(len(not_begun(pair, hand)) > 1 for hand in hands.values())
        kept_in_a_row = kept_in_a_row + 1 if idle and keeps else 0
        assert kept_in_a_row < 3, "for longer than it takes to give one back"

    assert {pair.job(job_id).state for job_id in jobs} == {JobState.SUCCEEDED}


@dataclass
class Stream:
    """What was sent so far, in order."""

    sent: list[str] = field(default_factory=list)


@contextmanager
def stream_of_joiners(system: JobSystem) -> Iterator[Stream]:
    """Jobs that share the device, as fast as the worker runs them: some always wait."""
    stream, over = Stream(), threading.Event()

    def keep_on() -> None:
        while not over.is_set():
            if system.store.depth(STUB_QUEUE).waiting < 4:
                stream.sent.append(system.submit(steps=10, step_ms=5))
            else:
                over.wait(0.005)

    thread = threading.Thread(target=keep_on)
    thread.start()
    try:
        yield stream
    finally:
        over.set()
        thread.join()


def picture(system: JobSystem, dtype: str, steps: int) -> str:
    body = {
        "task": "text2image",
        "model": "shapes",
        "backend": "cpu",
        "inputs": {"prompt": "a red circle"},
        "config": {"num_inference_steps": steps, "dtype": dtype},
    }
    return system.submission.submit(parse_request(body), owner="").record.id


def test_what_comes_after_a_job_that_waits_for_memory_waits_in_the_queue_though_it_could_share(
    system: JobSystem, processes: Processes
) -> None:
    settings = system.settings.model_copy(update={"pipeline_cache_size": 1, "cpu_devices": 1})
    processes.worker(settings, "cpu-shapes")
    running = picture(system, "fp32", steps=200)
    system.seen(running, EventName.STAGE_PROGRESS, 60.0)
    waits = picture(system, "bf16", steps=1)
    eventually(lambda: [event for event in system.events(waits) if event.stage == WAITING])
    assert system.job(waits).phase is Phase.WAITING

    late = picture(system, "fp32", steps=1)
    step = steps_of(system, running)
    eventually(lambda: steps_of(system, running) > step + 10)

    assert system.job(late).state is JobState.QUEUED
    system.store.cancel(running)
    assert system.finished(waits, 60.0).state is JobState.SUCCEEDED
    assert system.finished(late, 60.0).state is JobState.SUCCEEDED


def steps_of(system: JobSystem, job_id: str) -> int:
    progress = system.job(job_id).progress
    return 0 if progress is None else progress.step
