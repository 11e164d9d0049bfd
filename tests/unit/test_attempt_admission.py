"""Whom a worker lets begin: at most one job waits in it that another worker could have."""

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from omnirt_tasks.contract import EventName, JobState
from omnirt_tasks.jobs.values import Claim, Requeue, StoredJob
from omnirt_tasks.observability.metrics import CHUNK_SIZE, DeviceMetrics
from tests.support.attempts import Bench
from tests.support.waiting import eventually
from workers.host import HostEvent, InterruptReason

WAITING, LOAD = "waiting", "load"


def elsewhere(_: StoredJob) -> bool:
    return True


@pytest.fixture
def beside(make_bench: Callable[..., Bench]) -> Bench:
    """A worker beside which others serve the queue."""
    return make_bench(serves_elsewhere=elsewhere)


def wait(bench: Bench, job_id: str) -> None:
    bench.host.tell[job_id](HostEvent(EventName.STAGE_START, WAITING))


def go_on(bench: Bench, job_id: str) -> None:
    bench.host.tell[job_id](HostEvent(EventName.STAGE_END, WAITING, {"elapsed_ms": 1.0}))
    bench.host.tell[job_id](HostEvent(EventName.STAGE_START, LOAD))


def runs_alone(bench: Bench, job_id: str) -> str:
    """A queued job that is to have a device to itself."""
    bench.queue(job_id)
    claim = bench.store.claim(job_id, worker_id="before", lease_ttl_ms=60_000)
    assert isinstance(claim, Claim)
    bench.store.give_back(claim.lease, Requeue("test", alone=True))
    return job_id


def test_nothing_is_taken_while_a_run_waits(make_bench: Callable[..., Bench]) -> None:
    crowded: list[bool] = []
    bench = make_bench(on_crowded=crowded.append)
    job_id = bench.begun()

    wait(bench, job_id)
    assert crowded == [True]
    go_on(bench, job_id)
    assert crowded == [True, False]


def test_a_run_that_ends_while_it_waits_makes_room(bench: Bench) -> None:
    job_id = bench.begun()
    wait(bench, job_id)

    bench.runner.cancel(job_id)

    bench.end(job_id)
    eventually(lambda: not bench.crowded)


def test_a_second_run_that_comes_to_wait_goes_back_without_blame_and_the_first_stays(beside: Bench) -> None:
    first, second = beside.begun("first"), beside.begun("second")
    wait(beside, first)

    wait(beside, second)

    told = beside.end_told(second)
    assert told is not None
    assert (told.job.record.state, told.to_send) == (JobState.QUEUED, True)
    assert beside.reasons(second) == ["no_room"]
    assert (told.job.deaths, told.job.retries, told.job.runs_alone) == (0, 0, False)
    assert beside.host.interrupts == [(second, InterruptReason.NO_ROOM)]
    assert beside.state(first) is JobState.RUNNING
    assert beside.crowded
    go_on(beside, first)
    beside.host.succeed(first)
    beside.end(first)


def test_of_two_that_come_to_wait_the_older_stays_whoever_came_to_it_first(beside: Bench) -> None:
    older, younger = beside.begun("older"), beside.begun("younger")
    wait(beside, younger)
    assert beside.state(younger) is JobState.RUNNING

    wait(beside, older)

    beside.end(younger)
    assert beside.reasons(younger) == ["no_room"]
    assert beside.state(older) is JobState.RUNNING


def test_where_no_other_worker_serves_the_queue_those_that_came_to_wait_stay(bench: Bench) -> None:
    jobs = [bench.begun(name) for name in ("first", "second", "third")]
    for job_id in jobs:
        wait(bench, job_id)

    for job_id in jobs:
        go_on(bench, job_id)
        bench.host.succeed(job_id)
        assert bench.end(job_id) is not None
    assert [bench.state(job_id) for job_id in jobs] == [JobState.SUCCEEDED] * 3
    assert not bench.crowded


def test_a_job_whose_message_came_while_one_waits_goes_back_unclaimed(beside: Bench) -> None:
    first = beside.begun("first")
    wait(beside, first)

    beside.begin(beside.queue("late"))

    told = beside.end_told("late")
    assert told is not None
    assert told.requeue is not None
    assert (told.job.record.attempt, told.requeue.reason, told.to_send) == (0, "no_room", True)


def test_behind_one_that_waits_to_be_alone_a_second_one_goes_back_and_keeps_nobody_up(beside: Bench) -> None:
    busy = beside.begun("busy")
    alone, another = runs_alone(beside, "alone"), runs_alone(beside, "another")
    beside.in_line(alone)
    eventually(lambda: beside.crowded)

    beside.begin(another)

    told = beside.end_told(another)
    assert told is not None
    assert told.requeue is not None
    assert told.requeue.reason == "no_room"
    beside.host.succeed(busy)
    eventually(lambda: beside.orders(alone, 2))
    beside.host.succeed(alone)
    beside.end(alone)
    assert not beside.crowded


def test_nothing_is_taken_while_a_run_has_the_device_as_a_whole(make_bench: Callable[..., Bench]) -> None:
    crowded: list[bool] = []
    bench = make_bench(models_holding={"stub"}, on_crowded=crowded.append)

    job_id = bench.begun()
    assert crowded == [True]

    bench.host.succeed(job_id)
    bench.end(job_id)
    assert crowded == [True, False]


def test_a_second_one_that_wants_the_device_as_a_whole_goes_back_before_the_device_hears_of_it(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(models_holding={"stub"}, serves_elsewhere=elsewhere)
    first, second = bench.begun("first"), bench.queue("second")
    bench.begin(second)
    ended = bench.end_told(second)

    assert ended is not None
    assert (ended.job.record.state, second in bench.host.orders) == (JobState.QUEUED, False)
    bench.host.succeed(first)
    bench.end(first)


def test_how_far_a_run_shared_its_device_calls_is_counted(make_bench: Callable[..., Bench]) -> None:
    registry = CollectorRegistry()
    bench = make_bench(metrics=DeviceMetrics(registry))
    job_id = bench.begun()

    bench.host.succeed(job_id)
    bench.end(job_id)

    assert registry.get_sample_value(f"{CHUNK_SIZE.name}_count", {"model": "stub"}) == 1
