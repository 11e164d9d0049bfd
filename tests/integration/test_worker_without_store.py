"""A worker whose Redis goes away and comes back."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from omnirt_tasks.contract import EventName, JobState
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.settings import Settings
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes, environment
from tests.support.waiting import eventually


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker of the test's own, which keeps its data and its address over a restart."""
    with EmbeddedBroker(data_dir=tmp_path / "broker") as broker:
        yield broker


def test_a_job_outlives_a_restart_of_redis_and_ends_once(
    broker: EmbeddedBroker, settings: Settings, processes: Processes
) -> None:
    own = settings.model_copy(update={"redis_url": SecretStr(broker.url)})
    worker = processes.worker(own, STUB_QUEUE)
    system = JobSystem(own)
    try:
        job_id = system.submit(steps=60, step_ms=20)
        system.seen(job_id, EventName.STAGE_PROGRESS)

        broker.stop()
        broker.start()

        job = system.finished(job_id)
        assert job.state is JobState.SUCCEEDED
        assert len(system.events(job_id, EventName.JOB_FINISHED)) == 1
        steps = [event.data["step"] for event in system.events(job_id, EventName.STAGE_PROGRESS)]
        assert steps[-60:] == list(range(1, 61)), "what could not be told while it was away is told later, in order"
        assert worker.exit_code is None
        eventually(lambda: system.celery_state(job_id) == "SUCCESS")
        assert system.finished(system.submit()).state is JobState.SUCCEEDED
    finally:
        system.close()


def test_a_job_that_ends_while_redis_is_away_is_committed_when_it_is_back(
    broker: EmbeddedBroker, settings: Settings, processes: Processes
) -> None:
    own = settings.model_copy(update={"redis_url": SecretStr(broker.url), "lease_ttl_s": 30.0})
    worker = processes.worker(own, STUB_QUEUE)
    system = JobSystem(own)
    try:
        job_id = system.submit(steps=30, step_ms=10)
        system.seen(job_id, EventName.STAGE_PROGRESS)

        broker.stop()
        assert not worker.wait(1.5)  # the job's steps are over by now
        broker.start()

        job = system.finished(job_id)
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
        assert len(system.events(job_id, EventName.JOB_FINISHED)) == 1
    finally:
        system.close()


def test_a_worker_that_starts_before_redis_waits_for_it_and_then_hears_of_cancels(
    broker: EmbeddedBroker, settings: Settings, processes: Processes
) -> None:
    # So long a lease that its renewal would tell of the cancel much later than the notice does.
    own = settings.model_copy(update={"redis_url": SecretStr(broker.url), "lease_ttl_s": 120.0})
    broker.stop()
    command = [sys.executable, "-m", "celery", "-A", "omnirt_tasks", "worker", "-Q", STUB_QUEUE]
    worker = processes.start("worker", command, env=environment(own))
    eventually(lambda: "waits for its store" in "\n".join(worker.last_lines), 20)

    broker.start()

    system = JobSystem(own)
    try:
        assert system.finished(system.submit()).state is JobState.SUCCEEDED
        cancelled = system.submit(steps=200, step_ms=100)
        system.seen(cancelled, EventName.STAGE_PROGRESS)
        eventually(lambda: system.redis.pubsub_numsub(f"{own.key_prefix}:cancel")[0][1] == 2)  # the worker and the test
        system.store.cancel(cancelled)
        assert system.finished(cancelled, timeout_s=5).state is JobState.CANCELLED
        assert worker.exit_code is None
    finally:
        system.close()
