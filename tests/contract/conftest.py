"""Every job store there is, for tests that all of them must pass."""

from collections.abc import Iterator

import pytest

from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.memory_feed import MemoryFeed
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.settings import Settings
from tests.support.jobs import DEATHS_MAX, ManualClock, Rig, ScriptClock, pass_redis_time

JOB_TTL_S = 0.05


def memory_rig() -> Rig:
    clock = ManualClock()
    store = MemoryJobStore(job_ttl_s=JOB_TTL_S, deaths_max=DEATHS_MAX, now_ms=clock)
    return Rig(store, MemoryFeed(store), clock.pass_time)


@pytest.fixture(params=["memory", "redis"])
def rig(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Rig]:
    """A store of each kind; jobs are kept 50 ms after their end."""
    if request.param == "memory":
        yield memory_rig()
        return
    client = connect(settings.redis_url)
    store = RedisJobStore(client, prefix=settings.key_prefix, job_ttl_s=JOB_TTL_S, deaths_max=DEATHS_MAX)
    clock = ScriptClock(store, client, prefix=settings.key_prefix)
    feed = RedisFeed(client, prefix=settings.key_prefix)

    def pass_time(ms: int) -> None:
        clock.pass_time(ms)
        pass_redis_time(client, ms)  # by which keys come to their end

    yield Rig(store, feed, pass_time)
    feed.close()
    client.close()
