"""Every job store there is, for tests that all of them must pass."""

from collections.abc import Iterator

import pytest

from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.memory import MemoryFeed, MemoryJobStore
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.settings import Settings
from tests.support.jobs import ManualClock, Rig, pass_redis_time

JOB_TTL_S = 0.05


def memory_rig() -> Rig:
    clock = ManualClock()
    store = MemoryJobStore(job_ttl_s=JOB_TTL_S, now_ms=clock)
    return Rig(store, MemoryFeed(store), clock.pass_time)


@pytest.fixture(params=["memory", "redis"])
def rig(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Rig]:
    """A store of each kind; jobs are kept 50 ms after their end."""
    if request.param == "memory":
        yield memory_rig()
        return
    client = connect(settings.redis_url)
    store = RedisJobStore(client, prefix=settings.key_prefix, job_ttl_s=JOB_TTL_S)
    feed = RedisFeed(client, prefix=settings.key_prefix)
    yield Rig(store, feed, lambda ms: pass_redis_time(client, ms))
    feed.close()
    client.close()
