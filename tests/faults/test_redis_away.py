"""A worker whose Redis goes away and comes back, or only seems to be there."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from pydantic import SecretStr

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.contract import EventName, JobRecord, JobState
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.settings import Settings
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.proxy import Proxy, Stall
from tests.support.waiting import eventually
from workers.canary import RESTARTS_MAX
from workers.serving import EXIT_STUCK

LEASE_S = 2.0
BACK_TO_WORK_MAX_S = 45.0  # thrice what is promised: these machines are busy


@dataclass
class Site:
    """A broker of the test's own, one worker, and a system to send it jobs."""

    broker: EmbeddedBroker
    system: JobSystem
    settings: Settings
    processes: Processes
    lines: list[str] = field(default_factory=list)

    def worker(self, **changes: object) -> ChildProcess:
        """A bare worker that takes messages."""
        worker = self.processes.start_worker(
            self.settings.model_copy(update=changes), STUB_QUEUE, on_line=self.lines.append
        )
        eventually(lambda: any(" ready." in line for line in self.lines), 45, told=lambda: "\n".join(self.lines))
        return worker

    def process(self) -> psutil.Process:
        """The Celery process of the only worker."""
        (worker,) = eventually(self.system.fleet.live)
        return psutil.Process(worker.pid)

    def kill_broker(self) -> None:
        """SIGKILL it, and make as if nobody was there."""
        child = self.broker.child
        assert child is not None
        child.kill()
        assert child.wait(10)
        self.broker.stop()

    def ended_once(self, job_id: str, timeout_s: float = 60.0) -> JobRecord:
        """The job, once it is over: with one terminal event, and its log without a gap."""
        job = self.system.finished(job_id, timeout_s)
        events = self.system.events(job_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert len([event for event in events if event.event in TERMINAL]) == 1
        return job


TERMINAL = {EventName.JOB_FINISHED, EventName.JOB_FAILED, EventName.JOB_CANCELLED}


@pytest.fixture
def site(settings: Settings, processes: Processes, tmp_path: Path) -> Iterator[Site]:
    with EmbeddedBroker(data_dir=tmp_path / "broker") as broker:
        own = settings.model_copy(update={"redis_url": SecretStr(broker.url), "lease_ttl_s": LEASE_S})
        system = JobSystem(own)
        try:
            yield Site(broker, system, own, processes)
        finally:
            system.close()
            processes.stop_all()


def test_jobs_that_run_while_redis_is_killed_and_restarted_end_once_in_their_first_attempt(site: Site) -> None:
    site.worker()
    jobs = [site.system.submit(steps=150, step_ms=30) for _ in range(3)]
    for job_id in jobs:
        site.system.seen(job_id, EventName.STAGE_PROGRESS)

    site.kill_broker()
    site.broker.start()

    for job_id in jobs:
        job = site.ended_once(job_id)
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


def test_work_goes_on_after_an_outage_of_some_seconds(site: Site) -> None:
    worker = site.worker()
    running = site.system.submit(steps=200, step_ms=40)
    waiting = site.system.submit()
    site.system.finished(waiting)

    site.kill_broker()
    assert not worker.wait(5.0)
    site.broker.start()
    back_s = time.monotonic()
    new = site.system.submit()
    site.ended_once(new)
    took_s = time.monotonic() - back_s

    assert took_s < BACK_TO_WORK_MAX_S
    assert site.ended_once(running).attempt == 1


def test_a_worker_that_redis_was_away_from_for_longer_than_its_lease_publishes_one_result(site: Site) -> None:
    worker = site.worker(cpu_devices=2)
    site.processes.worker(site.settings.model_copy(update={"cpu_devices": 2}), STUB_QUEUE)
    jobs = [site.system.submit(steps=100, step_ms=30) for _ in range(4)]
    for job_id in jobs:
        site.system.seen(job_id, EventName.STAGE_PROGRESS)

    site.kill_broker()
    assert not worker.wait(3 * LEASE_S)
    site.broker.start()

    for job_id in jobs:
        assert site.ended_once(job_id).state is JobState.SUCCEEDED
    assert site.ended_once(site.system.submit()).state is JobState.SUCCEEDED


def test_connections_that_are_cut_again_and_again_lose_no_job(site: Site) -> None:
    worker = site.worker()
    jobs = []
    for _ in range(8):
        jobs.append(site.system.submit(steps=20, step_ms=20))
        site.system.redis.client_kill_filter(_type="normal", skipme=True)
        site.system.redis.client_kill_filter(_type="pubsub", skipme=True)
        assert not worker.wait(0.3)

    for job_id in jobs:
        assert site.ended_once(job_id).state is JobState.SUCCEEDED
    assert site.ended_once(site.system.submit()).state is JobState.SUCCEEDED


def test_a_worker_whose_redis_is_away_neither_spins_nor_floods_its_log(site: Site) -> None:
    worker = site.worker()
    running = site.system.submit(steps=200, step_ms=50)
    site.system.seen(running, EventName.STAGE_PROGRESS)
    process = site.process()

    site.kill_broker()
    assert not worker.wait(1.0)  # what every part says once
    lines, used_s = len(site.lines), sum(process.cpu_times()[:2])
    assert not worker.wait(6.0)
    more_lines, more_s = len(site.lines) - lines, sum(process.cpu_times()[:2]) - used_s
    site.broker.start()

    assert more_s < 3.0, "\n".join(site.lines[lines:])
    assert more_lines < 40, "\n".join(site.lines[lines:])
    assert site.ended_once(running).state is JobState.SUCCEEDED


@pytest.mark.parametrize("how", list(Stall))
def test_a_worker_notices_by_itself_that_its_connection_brings_no_more_messages(site: Site, how: Stall) -> None:
    address = urlsplit(site.broker.url)
    assert address.port is not None
    with Proxy(address.port) as proxy:
        through = site.broker.url.replace(f":{address.port}/", f":{proxy.port}/")
        site.worker(broker_url=SecretStr(through), stall_after_s=1.0)
        site.ended_once(site.system.submit())
        proxy.stall(how)
        assert proxy.stalled.wait(10)

        job_id = site.system.submit()

        assert site.ended_once(job_id, timeout_s=45).state is JobState.SUCCEEDED
        told = [line for line in site.lines if "its consumer is restarted" in line]
        assert len(told) == 1, "\n".join(site.lines)
        site.processes.stop_all()


def test_a_worker_that_no_restart_of_its_consumer_mends_ends_loudly(site: Site) -> None:
    address = urlsplit(site.broker.url)
    assert address.port is not None
    with Proxy(address.port) as proxy:
        through = site.broker.url.replace(f":{address.port}/", f":{proxy.port}/")
        worker = site.worker(broker_url=SecretStr(through), stall_after_s=0.5)
        proxy.stall(Stall.ELSEWHERE, for_good=True)
        assert proxy.stalled.wait(10)

        job_id = site.system.submit()

        assert worker.wait(60)
        assert worker.exit_code == EXIT_STUCK, "\n".join(site.lines)
        assert len([line for line in site.lines if "its consumer is restarted" in line]) == RESTARTS_MAX
    site.processes.worker(site.settings, STUB_QUEUE)
    assert site.ended_once(job_id).attempt == 1


def test_a_connection_that_breaks_before_a_message_is_acknowledged_does_not_end_the_worker(site: Site) -> None:
    address = urlsplit(site.broker.url)
    assert address.port is not None
    with Proxy(address.port) as proxy:
        through = site.broker.url.replace(f":{address.port}/", f":{proxy.port}/")
        worker = site.worker(broker_url=SecretStr(through))
        proxy.cut_at(b"HDEL")  # how kombu acknowledges

        job_id = site.system.submit(steps=20, step_ms=20)

        assert proxy.cut.wait(10)
        eventually(lambda: worker.exit_code or [line for line in site.lines if "Cannot connect" in line], 20)
        proxy.mend()
        assert site.ended_once(job_id).attempt == 1
        assert site.ended_once(site.system.submit(), timeout_s=45).state is JobState.SUCCEEDED
        assert worker.exit_code is None, "\n".join(site.lines)
        site.processes.stop_all()


def test_a_frozen_worker_that_wakes_harms_nothing(site: Site) -> None:
    site.worker(cpu_devices=2)
    site.processes.worker(site.settings.model_copy(update={"cpu_devices": 2}), STUB_QUEUE)
    workers = eventually(lambda: found if len(found := site.system.fleet.live()) == 2 else ())
    job_id = site.system.submit(steps=150, step_ms=30)
    holder = site.system.seen(job_id, EventName.JOB_STARTED).data["worker_id"]
    site.system.seen(job_id, EventName.STAGE_PROGRESS)
    (frozen,) = [worker for worker in workers if worker.worker_id == holder]

    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        job = site.ended_once(job_id)
    finally:
        os.kill(frozen.pid, signal.SIGCONT)

    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    again = [site.system.submit() for _ in range(4)]
    assert {site.ended_once(other).state for other in again} == {JobState.SUCCEEDED}
    assert site.ended_once(job_id).attempt == 2, "what the frozen worker made of it counts no more"
