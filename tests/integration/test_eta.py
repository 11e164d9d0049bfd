"""What a waiting job's record tells of when it will be done, over HTTP."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.gateway import QUEUE, REQUEST, Gateway, gateway_settings, running_gateway
from tests.support.processes import Processes
from tests.support.waiting import eventually

STEP_MS = 60.0
JOB: dict[str, Any] = REQUEST | {"config": {"num_inference_steps": 2, "step_ms": STEP_MS}}
LONG: dict[str, Any] = REQUEST | {"config": {"num_inference_steps": 200, "step_ms": STEP_MS}}


@pytest.fixture
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(gateway_settings(redis_url, tmp_path_factory.mktemp("gateway"))) as running:
        yield running


def record_of(gateway: Gateway, job_id: str) -> dict[str, Any]:
    record: dict[str, Any] = gateway.http.get(f"/v1/jobs/{job_id}").json()
    return record


def queue_of(gateway: Gateway, job_id: str) -> dict[str, Any]:
    queue: dict[str, Any] = record_of(gateway, job_id)["queue"]
    return queue


def test_nothing_is_told_before_anything_ended_nor_where_nobody_serves(gateway: Gateway) -> None:
    early = gateway.submit()
    assert (queue_of(gateway, early)["eta_s"], queue_of(gateway, early)["workers"]) == (None, 0)

    gateway.worker.announce()
    assert queue_of(gateway, gateway.submit())["eta_s"] is None
    gateway.worker.run(early)

    eventually(lambda: queue_of(gateway, gateway.submit())["eta_s"] is not None)


def test_a_job_that_is_split_is_done_with_its_last_part(gateway: Gateway) -> None:
    gateway.worker.announce()
    for _ in range(3):
        gateway.worker.run(gateway.submit())
    whole = gateway.submit()
    eventually(lambda: queue_of(gateway, whole)["eta_s"] is not None)
    alone = queue_of(gateway, whole)
    gateway.http.delete(f"/v1/jobs/{whole}")

    split = queue_of(gateway, gateway.submit(**REQUEST | {"config": {"num_images_per_prompt": 16}}))

    assert split["position"] == alone["position"] == 1
    assert split["eta_s"] > 1.5 * alone["eta_s"]


def test_with_a_real_worker_it_grows_along_the_line_and_comes_true(gateway: Gateway, processes: Processes) -> None:
    processes.worker(gateway.settings, QUEUE, arguments=("-c", "1"))
    for job_id in [gateway.submit(**JOB) for _ in range(6)]:
        eventually(lambda job_id=job_id: record_of(gateway, job_id)["state"] == "succeeded", 20.0)  # type: ignore[misc]
    running = gateway.submit(**LONG)
    eventually(lambda: record_of(gateway, running)["state"] == "running")
    line = [gateway.submit(**JOB) for _ in range(5)]

    eventually(lambda: queue_of(gateway, line[0])["eta_s"])  # within a second of what has ended
    told = [queue_of(gateway, job_id) for job_id in line]

    assert [queue["position"] for queue in told] == [1, 2, 3, 4, 5]
    etas_s = [queue["eta_s"] for queue in told]
    assert etas_s == sorted(etas_s)
    assert etas_s[-1] > 2 * etas_s[0]
    assert all(queue["eta_p90_s"] >= queue["eta_s"] for queue in told)
    gateway.http.delete(f"/v1/jobs/{running}")
    eventually(lambda: record_of(gateway, line[-1])["state"] == "succeeded", 20.0)
    first, last = record_of(gateway, line[0]), record_of(gateway, line[-1])
    took_s = (last["finished_at_ms"] - first["started_at_ms"]) / 1000
    assert etas_s[-1] / 3 < took_s < etas_s[-1] * 3, "five of the six that it was told from"
    assert record_of(gateway, line[0])["queue"] is None
