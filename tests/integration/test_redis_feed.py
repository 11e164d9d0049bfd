"""The feed on a real broker: one connection for all watchers, and a broker that comes and goes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import redis

from omnirt_tasks.contract import Event, EventName
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.subscription import Missed
from omnirt_tasks.jobs.values import Lease
from omnirt_tasks.jobs.watch import wait_finished, watch
from omnirt_tasks.settings import Settings, load_settings
from tests.support.jobs import claimed, failed, new_job, step
from tests.support.waiting import eventually


class System:
    """A client, a store and a feed of one broker."""

    def __init__(self, settings: Settings) -> None:
        self.client: Any = connect(settings.redis_url)
        self.prefix = settings.key_prefix
        self.store = RedisJobStore(self.client, prefix=self.prefix, job_ttl_s=60)
        self.feed = RedisFeed(self.client, prefix=self.prefix)

    def start_job(self) -> tuple[str, Lease]:
        job_id = self.store.create(new_job()).record.id
        return job_id, claimed(self.store, job_id)

    def subscriber_connections(self) -> int:
        return len(self.client.client_list(_type="pubsub"))

    def watched_channels(self) -> list[str]:
        return list(self.client.pubsub_channels(f"{self.prefix}:events:*"))

    def answers(self) -> bool:
        try:
            self.store.ping()
        except StoreUnavailable:
            return False
        return True

    def close(self) -> None:
        self.feed.close()
        self.client.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker of the test's own, to stop and start; its data outlive it."""
    with EmbeddedBroker(data_dir=tmp_path / "broker") as broker:
        yield broker


@pytest.fixture
def system(broker: EmbeddedBroker) -> Iterator[System]:
    with closing(System(load_settings(redis_url=broker.url, key_prefix="feed"))) as system:
        yield system


def test_three_hundred_watchers_share_one_connection(system: System) -> None:
    jobs = [system.start_job() for _ in range(30)]
    with ThreadPoolExecutor(300) as pool, ExitStack() as stack:
        everyone_watches = threading.Barrier(301, timeout=60)

        def see(job_id: str) -> list[int]:
            events = stack.enter_context(closing(watch(system.store, system.feed, job_id)))
            seen = [next(events)]
            everyone_watches.wait()
            return [event.seq for event in (*seen, *events) if event is not None]

        watching = [pool.submit(see, jobs[number % 30][0]) for number in range(300)]
        everyone_watches.wait()
        assert system.subscriber_connections() == 1
        assert len(system.watched_channels()) == 30
        for _, lease in jobs:
            system.store.append(lease, [step(1), step(2)])
            system.store.commit(lease, failed())
        assert all(seen.result(60) == [1, 2, 3, 4, 5] for seen in watching)


def test_the_channel_of_a_job_that_nobody_watches_any_more_is_left(system: System) -> None:
    first, second = system.start_job()[0], system.start_job()[0]
    with closing(system.feed.subscribe(first)):
        with closing(system.feed.subscribe(second)), closing(system.feed.subscribe(second)):
            assert len(system.watched_channels()) == 2
        eventually(lambda: system.watched_channels() == [f"{system.prefix}:events:{first}"])


def test_a_channel_that_is_left_and_entered_again_still_delivers(system: System) -> None:
    job_id, lease = system.start_job()
    for number in range(1, 30):
        with closing(system.feed.subscribe(job_id)) as subscription:
            system.store.append(lease, [step(number, 30)])
            event = subscription.next(5)
            assert isinstance(event, Event)
            assert event.data["step"] == number


def test_a_feed_that_nobody_used_has_no_thread_and_no_connection(system: System) -> None:
    assert system.subscriber_connections() == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "omnirt-feed"]


def test_a_watcher_sees_every_event_across_a_restart_of_the_broker(system: System, broker: EmbeddedBroker) -> None:
    job_id, lease = system.start_job()
    seen: list[int] = []
    watching = threading.Event()

    def see() -> None:
        with closing(watch(system.store, system.feed, job_id, keepalive_s=0.2)) as events:
            for event in events:
                if event is not None:
                    seen.append(event.seq)
                watching.set()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(see)
        assert watching.wait(10)
        broker.stop()
        assert not system.answers()
        broker.start()
        assert eventually(system.answers)
        # Logged before the feed may be back: the watcher learns of it by reading the log again.
        system.store.append(lease, [step(1)])
        eventually(lambda: system.subscriber_connections() == 1)
        system.store.append(lease, [step(2)])
        system.store.commit(lease, failed())
        done.result(20)
    assert seen == [1, 2, 3, 4, 5]


def test_a_waiter_gets_the_end_across_a_restart_of_the_broker(system: System, broker: EmbeddedBroker) -> None:
    job_id, lease = system.start_job()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_finished, system.store, system.feed, job_id, timeout_s=30)
        eventually(system.watched_channels)
        broker.stop()
        broker.start()
        assert eventually(system.answers)
        system.store.commit(lease, failed())
        job = waiting.result(8)  # by the event or by the reconnect; not by the slow second look
    assert job is not None
    assert job.record.finished


def test_a_connection_that_was_killed_is_made_again_and_the_watchers_are_told(system: System) -> None:
    job_id, lease = system.start_job()
    with closing(system.feed.subscribe(job_id)) as subscription:
        system.client.client_kill_filter(_type="pubsub")
        assert isinstance(subscription.next(10), Missed)
        system.store.append(lease, [step(1)])
        event = subscription.next(10)
        assert isinstance(event, Event)
        assert event.event is EventName.STAGE_PROGRESS


@pytest.mark.parametrize("ended_unseen", [True, False])
def test_a_watcher_sees_the_end_though_redis_lost_what_it_was_told(system: System, ended_unseen: bool) -> None:
    job_id, lease = system.start_job()
    kept = [f"{system.prefix}:{kind}:{job_id}" for kind in ("job", "log")]
    on_disk = {key: _binary(system).dump(key) for key in kept}
    with closing(watch(system.store, system.feed, job_id, keepalive_s=0.2)) as events:
        assert next(events) is not None
        system.store.append(lease, [step(number) for number in (1, 2, 3)])
        told = [event.seq for event in _until(events, 5)]
        for key, value in on_disk.items():  # as after a loss of power
            system.client.delete(key)
            _binary(system).restore(key, 0, value)
        system.client.client_kill_filter(_type="pubsub")
        if not ended_unseen:
            assert next(events) is None
        system.store.commit(lease, failed())
        names = [event.event for event in events if event is not None]
    assert told == [2, 3, 4, 5]
    assert names == [EventName.JOB_FAILED]


def _binary(system: System) -> Any:
    """A client whose answers are bytes, for what is no text."""
    pool = system.client.connection_pool
    options = {**pool.connection_kwargs, "decode_responses": False}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **options))


def _until(events: Iterator[Event | None], seq: int) -> list[Event]:
    told: list[Event] = []
    while not told or told[-1].seq < seq:
        told += [event for event in [next(events)] if event is not None]
    return told


def test_a_subscription_while_the_broker_is_away_is_refused_and_works_later(
    system: System, broker: EmbeddedBroker
) -> None:
    job_id, lease = system.start_job()
    broker.stop()
    with pytest.raises(StoreUnavailable) as caught:
        system.feed.subscribe(job_id)
    assert caught.value.retry_after_s
    with pytest.raises(StoreUnavailable):
        system.feed.on_cancel(lambda _: None)
    broker.start()
    assert eventually(system.answers)
    system.store.commit(lease, failed())
    assert wait_finished(system.store, system.feed, job_id, timeout_s=5) is not None


def test_cancel_notices_arrive_again_after_a_restart(system: System, broker: EmbeddedBroker) -> None:
    job_id, _ = system.start_job()
    told = threading.Event()
    system.feed.on_cancel(lambda cancelled: told.set() if cancelled == job_id else None)
    broker.stop()
    broker.start()
    assert eventually(system.answers)
    eventually(lambda: system.client.pubsub_numsub(f"{system.prefix}:cancel")[0][1] == 1)
    system.store.cancel(job_id)
    assert told.wait(10)


def test_a_callback_that_fails_stops_nobody_else(system: System, caplog: pytest.LogCaptureFixture) -> None:
    job_id, lease = system.start_job()
    told = threading.Event()

    def fail(_: str) -> None:
        told.set()
        raise RuntimeError("a fault of the callback")

    system.feed.on_cancel(fail)
    with closing(system.feed.subscribe(job_id)) as subscription:
        system.store.cancel(job_id)
        assert told.wait(10)
        system.store.append(lease, [step(1)])
        assert isinstance(subscription.next(10), Event)
    assert "could not be delivered" in caplog.text
