"""What was answered with 202 is there, whatever is killed right after."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from omnirt_tasks.contract import EventName
from omnirt_tasks.embedded import EmbeddedBroker
from tests.support.gateway import QUEUE, REQUEST, Gateway, gateway_settings, running_gateway
from tests.support.processes import Processes
from tests.support.waiting import eventually

SUBMITTERS = 6


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker of the test's own, which keeps its data."""
    with EmbeddedBroker(data_dir=tmp_path / "broker") as running:
        yield running


def kill_and_start(broker: EmbeddedBroker) -> None:
    """SIGKILL the server, and start it again on what it left."""
    assert broker.child is not None
    broker.child.kill()
    assert broker.child.wait(10)
    broker.stop()
    broker.start()


def waits(gateway: Gateway, least: int) -> bool:
    """Whether more jobs than that wait."""
    return gateway.worker.store.depth(QUEUE).waiting > least


def submit_until_refused(gateway: Gateway) -> list[str]:
    """Submit one job after the other, until one is not accepted; the ids of those that were."""
    made: list[str] = []
    with httpx.Client(base_url=gateway.url, timeout=20) as http:
        while True:
            answer = http.post("/v1/jobs", json=REQUEST)
            if answer.status_code != 202:
                assert answer.status_code == 503, answer.text
                return made
            made.append(answer.json()["id"])


def test_redis_is_killed_right_after_it_took_a_job_and_none_is_lost(broker: EmbeddedBroker, tmp_path: Path) -> None:
    settings = gateway_settings(broker.url, tmp_path)
    with running_gateway(settings) as gateway, ThreadPoolExecutor(SUBMITTERS) as pool:
        accepted: set[str] = set()
        for _ in range(3):
            submitting = [pool.submit(submit_until_refused, gateway) for _ in range(SUBMITTERS)]
            before = len(accepted)
            eventually(partial(waits, gateway, before + 30))
            kill_and_start(broker)
            accepted |= {job_id for future in submitting for job_id in future.result(30)}
            eventually(lambda: gateway.http.get("/readyz").json()["ok"], 20)

            store = gateway.worker.store
            assert all(store.get(job_id).record.attempt == 0 for job_id in accepted), "each record is there"
            assert all([event.seq for event in store.events(job_id)] == [1] for job_id in accepted), "and its log"
            listed = set(gateway.worker.redis.zrange(f"{settings.key_prefix}:waiting:{QUEUE}", 0, -1))
            assert accepted <= listed, "and its place in the queue"


def test_what_was_accepted_before_redis_was_killed_runs_after_it(
    broker: EmbeddedBroker, tmp_path: Path, processes: Processes
) -> None:
    settings = gateway_settings(broker.url, tmp_path, unclaimed_after_s=1.0, heartbeat_s=0.3, grace_s=1.0)
    with running_gateway(settings) as gateway:
        made = [gateway.submit() for _ in range(5)]
        kill_and_start(broker)
        processes.worker(settings, QUEUE)

        def states() -> list[str]:
            return [gateway.worker.store.get(job_id).record.state for job_id in made]

        eventually(lambda: states() == ["succeeded"] * 5, 30, told=lambda: str(states()))
        for job_id in made:
            names = [event.event for event in gateway.worker.store.events(job_id)]
            assert names.count(EventName.JOB_FINISHED) == 1
