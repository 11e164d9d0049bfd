"""Every job store there is, for tests that all of them must pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import redis

from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.memory_feed import MemoryFeed
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.settings import Settings
from tests.support.jobs import DEATHS_MAX, PROMOTE_AFTER_MS, ManualClock, Rig, ScriptClock, pass_redis_time

JOB_TTL_S = 0.05


def memory_rig() -> Rig:
    clock = ManualClock()
    store = MemoryJobStore(
        job_ttl_s=JOB_TTL_S, deaths_max=DEATHS_MAX, promote_after_s=PROMOTE_AFTER_MS / 1000, now_ms=clock
    )
    return Rig(store, MemoryFeed(store), clock.pass_time)


@contextmanager
def redis_rig(settings: Settings) -> Iterator[tuple[Rig, redis.Redis]]:
    with connect(settings.redis_url) as client:
        store = RedisJobStore(
            client,
            prefix=settings.key_prefix,
            job_ttl_s=JOB_TTL_S,
            deaths_max=DEATHS_MAX,
            promote_after_s=PROMOTE_AFTER_MS / 1000,
        )
        clock = ScriptClock(store, client, prefix=settings.key_prefix)
        feed = RedisFeed(client, prefix=settings.key_prefix)
        yield Rig(store, feed, clock.pass_time), client
        feed.close()


@pytest.fixture(params=["memory", "redis"])
def rig(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Rig]:
    """A store of each kind; jobs are kept 50 ms after their end."""
    if request.param == "memory":
        yield memory_rig()
        return
    with redis_rig(settings) as (rig, client):

        def pass_time(ms: int) -> None:
            rig.pass_time(ms)
            pass_redis_time(client, ms)  # by which keys come to their end

        yield replace(rig, pass_time=pass_time)


@pytest.fixture(params=["memory", "redis"])
def quick_rig(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Rig]:
    """A store of each kind in which any time passes at once: no key comes to its end by itself."""
    if request.param == "memory":
        yield memory_rig()
        return
    with redis_rig(settings) as (rig, _):
        yield rig
