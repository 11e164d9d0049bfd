"""Redis without memory left: submits are refused with nothing half-written, reads work, and it heals by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.jobs.connection import connect
from tests.support.gateway import REQUEST, code_of, gateway_settings, running_gateway
from tests.support.waiting import eventually

PASSING = (":ready", "reconciler", "sweeper")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker of the test's own, to be filled."""
    with EmbeddedBroker(data_dir=tmp_path / "broker") as running:
        yield running


def fill(redis: Any) -> None:
    redis.config_set("maxmemory", 1)


def empty(redis: Any) -> None:
    redis.config_set("maxmemory", 0)


def contents(redis: Any) -> dict[str, object]:
    """Every key with its value, but for the locks and marks that come and go by themselves.

    A hash is read: serialised, its fields have an order, which Redis changes as it pleases.
    """
    kept = [key for key in redis.keys("*") if not key.endswith(PASSING)]
    return {
        key: redis.hgetall(key) if redis.type(key) == "hash" else redis.execute_command("DUMP", key, NEVER_DECODE=True)
        for key in kept
    }


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "a key"}], ids=["without a key", "under a key"])
def test_a_full_redis_refuses_submits_leaves_nothing_of_them_and_reads_work(
    broker: EmbeddedBroker, tmp_path: Path, headers: dict[str, str]
) -> None:
    with running_gateway(gateway_settings(broker.url, tmp_path)) as gateway:
        redis = gateway.worker.redis
        finished, queued = gateway.finished(), gateway.submit()
        before = contents(redis)
        fill(redis)

        for path in ("/v1/jobs", "/v1/generate", "/v1/jobs"):
            refused = gateway.http.post(path, json=REQUEST, headers=headers)
            assert (refused.status_code, code_of(refused)) == (503, "store_unavailable")
            assert int(refused.headers["Retry-After"]) >= 1
        ready = gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["ok"]) == (503, False)
        assert gateway.http.get(f"/v1/jobs/{queued}").json()["state"] == "queued"
        assert len(gateway.http.get("/v1/jobs").json()["data"]) == 2
        assert gateway.http.get(f"/v1/jobs/{finished}/artifacts/0.png").status_code == 200
        with gateway.watch(finished) as watching:
            assert list(watching.events())[-1].name == "job_finished"
        assert code_of(gateway.http.delete(f"/v1/jobs/{queued}")) == "store_unavailable"
        assert contents(redis) == before, "nothing is half-written"

        empty(redis)
        made = gateway.http.post("/v1/jobs", json=REQUEST, headers=headers)
        assert made.status_code == 202
        assert "Idempotent-Replayed" not in made.headers
        assert gateway.http.get("/readyz").json()["ok"]
        gateway.worker.run(made.json()["id"])


def test_a_finished_job_can_be_purged_from_a_full_redis(broker: EmbeddedBroker, tmp_path: Path) -> None:
    with running_gateway(gateway_settings(broker.url, tmp_path)) as gateway:
        finished = gateway.finished()
        fill(gateway.worker.redis)

        assert gateway.http.delete(f"/v1/jobs/{finished}?purge=true").status_code == 204

        assert not gateway.worker.redis.keys(f"*:{finished}")
        empty(gateway.worker.redis)


def test_a_broker_that_is_full_while_the_store_is_not_delays_the_message_alone(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    with EmbeddedBroker() as messages:
        settings = gateway_settings(broker.url, tmp_path, broker_url=messages.url, unclaimed_after_s=0.5)
        lists: Any = connect(messages.url)
        with running_gateway(settings) as gateway, lists:
            fill(lists)
            job_id = gateway.submit()
            assert gateway.http.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"

            empty(lists)

            def waiting() -> list[str]:
                return [
                    message
                    for key in lists.keys("*")
                    if lists.type(key) == "list"
                    for message in lists.lrange(key, 0, -1)
                ]

            eventually(lambda: any(job_id in message for message in waiting()), 20)
