"""What every fleet promises, whatever it is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.fleet import Fleet, MemoryFleet, RedisFleet
from omnirt_tasks.settings import Settings
from tests.support.jobs import LONG_MS, ManualClock, pass_redis_time


@dataclass(frozen=True)
class FleetRig:
    fleet: Fleet
    pass_time: Callable[[int], None]


@pytest.fixture(params=["memory", "redis"])
def rig(request: pytest.FixtureRequest, settings: Settings) -> Iterator[FleetRig]:
    if request.param == "memory":
        clock = ManualClock()
        yield FleetRig(MemoryFleet(now_ms=clock), clock.pass_time)
        return
    client = connect(settings.redis_url)
    yield FleetRig(RedisFleet(client, prefix=settings.key_prefix), lambda ms: pass_redis_time(client, ms))
    client.close()


def _worker(worker_id: str, **facts: object) -> WorkerCapability:
    return WorkerCapability.model_validate(
        {"worker_id": worker_id, "backend": "cpu", "device": "cpu:0", "queues": ["cpu-shapes"], **facts}
    )


def test_live_workers_are_told_in_order_with_all_they_said(rig: FleetRig) -> None:
    second = _worker("b@host", memory_bytes=2**40, tags=["eu"], models=["shapes"], running=3)
    first = _worker("a@host")
    rig.fleet.publish(second, ttl_ms=LONG_MS)
    rig.fleet.publish(first, ttl_ms=LONG_MS)
    assert rig.fleet.live() == (first, second)


def test_a_later_record_replaces_the_earlier_one(rig: FleetRig) -> None:
    rig.fleet.publish(_worker("a", running=0), ttl_ms=LONG_MS)
    rig.fleet.publish(_worker("a", running=1), ttl_ms=LONG_MS)
    assert [worker.running for worker in rig.fleet.live()] == [1]


def test_a_silent_worker_is_gone_and_comes_back_with_its_next_heartbeat(rig: FleetRig) -> None:
    rig.fleet.publish(_worker("silent"), ttl_ms=1)
    rig.fleet.publish(_worker("alive"), ttl_ms=LONG_MS)
    rig.pass_time(2)
    assert [worker.worker_id for worker in rig.fleet.live()] == ["alive"]
    rig.fleet.publish(_worker("silent"), ttl_ms=LONG_MS)
    assert len(rig.fleet.live()) == 2


def test_a_worker_that_leaves_is_gone_at_once(rig: FleetRig) -> None:
    rig.fleet.publish(_worker("a"), ttl_ms=LONG_MS)
    rig.fleet.withdraw("a")
    rig.fleet.withdraw("a")
    assert rig.fleet.live() == ()
