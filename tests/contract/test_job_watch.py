"""Watching a job and waiting for its end, whatever the store is made of."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from omnirt_tasks.contract import Event, EventName
from omnirt_tasks.errors import JobNotFound, StoreUnavailable
from omnirt_tasks.jobs.subscription import EventFeed, Missed, Subscription
from omnirt_tasks.jobs.values import Cancelled, Lease
from omnirt_tasks.jobs.watch import wait_finished, watch
from tests.support.jobs import Rig, claimed, failed, new_job, step
from tests.support.waiting import eventually


def _start(rig: Rig) -> tuple[str, Lease]:
    job_id = rig.store.create(new_job()).record.id
    return job_id, claimed(rig.store, job_id)


def _seqs(rig: Rig, job_id: str, after: int = 0) -> list[int]:
    """What a watcher sees until the end."""
    with closing(watch(rig.store, rig.feed, job_id, after=after, keepalive_s=0.2)) as events:
        return [event.seq for event in events if event is not None]


def _next(events: Iterator[Event | None]) -> Event:
    while (event := next(events)) is None:
        pass
    return event


def test_a_job_that_is_over_is_told_from_its_log_and_the_stream_ends(rig: Rig) -> None:
    job_id, lease = _start(rig)
    rig.store.append(lease, [step(1), step(2)])
    rig.store.commit(lease, failed())
    assert _seqs(rig, job_id) == [1, 2, 3, 4, 5]
    assert _seqs(rig, job_id, after=3) == [4, 5]
    assert _seqs(rig, job_id, after=5) == []
    assert _seqs(rig, job_id, after=99) == []


def test_a_watcher_from_the_start_sees_log_and_live_events_once_and_the_end(rig: Rig) -> None:
    job_id, lease = _start(rig)
    with closing(watch(rig.store, rig.feed, job_id, keepalive_s=5)) as events:
        assert [_next(events).seq for _ in range(2)] == [1, 2]
        rig.store.append(lease, [step(1)])
        assert _next(events).seq == 3
        rig.store.append(lease, [step(2)])
        rig.store.commit(lease, failed())
        assert [event and event.event for event in events] == [EventName.STAGE_PROGRESS, EventName.JOB_FAILED]


@pytest.mark.parametrize("after", [2, 50])
def test_a_watcher_at_or_beyond_the_end_sees_what_comes(rig: Rig, after: int) -> None:
    job_id, lease = _start(rig)
    with closing(watch(rig.store, rig.feed, job_id, after=after, keepalive_s=0.01)) as events:
        assert next(events) is None  # it waits, and says that it lives
        rig.store.append(lease, [step(1)])
        assert _next(events).seq == 3


def test_watchers_that_come_at_any_moment_see_every_event_once(rig: Rig) -> None:
    job_id, lease = _start(rig)
    with ThreadPoolExecutor(8) as pool:
        watching = []
        for number in range(1, 81):
            rig.store.append(lease, [step(number, 80)])
            if number % 10 == 0:
                watching.append(pool.submit(_seqs, rig, job_id, number // 2))
        rig.store.commit(lease, Cancelled())
        for index, seen in enumerate(watching):
            assert seen.result(20) == list(range((index + 1) * 5 + 1, 84))


def test_a_slow_watcher_is_told_that_it_missed_events_and_never_misses_the_end(rig: Rig) -> None:
    job_id, lease = _start(rig)
    with closing(rig.feed.subscribe(job_id)) as slow:
        for start in range(0, 600, 100):
            rig.store.append(lease, [step(start + number + 1, 600) for number in range(100)])
        rig.store.commit(lease, failed())
        with closing(rig.feed.subscribe("another")):  # now the feed has delivered what came before
            pass
        assert isinstance(slow.next(5), Missed)
        seqs = []
        while isinstance(event := slow.next(5), Event):
            seqs.append(event.seq)
            if event.terminal:
                break
    assert seqs == list(range(603 - len(seqs) + 1, 604))
    assert len(seqs) <= 256


def test_a_slow_watcher_gets_what_it_missed_from_the_log(rig: Rig) -> None:
    job_id, lease = _start(rig)
    with closing(watch(rig.store, rig.feed, job_id, keepalive_s=5)) as events:
        assert _next(events).seq == 1
        for start in range(0, 600, 100):
            rig.store.append(lease, [step(start + number + 1, 600) for number in range(100)])
        rig.store.commit(lease, failed())
        assert [event.seq for event in events if event is not None] == list(range(2, 604))


class _Lossy:
    """A feed that loses every second event and does not say so."""

    def __init__(self, feed: EventFeed) -> None:
        self._feed = feed
        self.on_cancel = feed.on_cancel
        self.close = feed.close

    def subscribe(self, job_id: str) -> Subscription:
        return _LossySubscription(self._feed.subscribe(job_id))


class _LossySubscription:
    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self.wake = subscription.wake
        self.close = subscription.close

    def next(self, timeout_s: float) -> Event | Missed | None:
        while isinstance(signal := self._subscription.next(timeout_s), Event) and signal.seq % 2:
            pass
        return signal


def test_a_gap_in_the_live_events_is_filled_from_the_log(rig: Rig) -> None:
    job_id, lease = _start(rig)
    with closing(watch(rig.store, _Lossy(rig.feed), job_id, keepalive_s=5)) as events:
        assert _next(events).seq == 1
        for number in range(1, 9):
            rig.store.append(lease, [step(number, 8)])
            rig.store.append(lease, [step(number, 8)])
        assert [_next(events).seq for _ in range(17)] == list(range(2, 19))


def test_a_waiting_reader_can_be_woken_without_an_event(rig: Rig) -> None:
    job_id, lease = _start(rig)
    with closing(rig.feed.subscribe(job_id)) as subscription, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(subscription.next, 30)
        subscription.wake()
        assert reading.result(5) is None
        rig.store.append(lease, [step(1)])
        assert isinstance(subscription.next(5), Event)


def test_an_unknown_job_is_told_so(rig: Rig) -> None:
    with pytest.raises(JobNotFound):
        next(watch(rig.store, rig.feed, "nobody"))
    with pytest.raises(JobNotFound):
        wait_finished(rig.store, rig.feed, "nobody", timeout_s=1)


def test_a_watched_job_that_is_purged_ends_for_its_watcher(rig: Rig) -> None:
    job_id, _ = _start(rig)
    with closing(watch(rig.store, rig.feed, job_id, after=2, keepalive_s=0.01)) as events:
        assert next(events) is None
        rig.store.purge(job_id)
        assert _next(events).event is EventName.JOB_CANCELLED


def test_waiting_ends_with_the_job(rig: Rig) -> None:
    job_id, lease = _start(rig)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_finished, rig.store, rig.feed, job_id, timeout_s=20)
        for number in range(1, 5):
            rig.store.append(lease, [step(number)])
        rig.store.commit(lease, failed())
        job = waiting.result(5)
    assert job is not None
    assert job.record.finished
    assert wait_finished(rig.store, rig.feed, job_id, timeout_s=5) == job


def test_waiting_gives_up_at_its_deadline(rig: Rig) -> None:
    job_id, _ = _start(rig)
    started = time.monotonic()
    assert wait_finished(rig.store, rig.feed, job_id, timeout_s=0.05) is None
    assert time.monotonic() - started < 5


def test_a_cancel_of_a_running_job_reaches_the_workers_at_once(rig: Rig) -> None:
    told: list[str] = []
    arrived = threading.Event()

    def on_cancel(job_id: str) -> None:
        told.append(job_id)
        arrived.set()

    rig.feed.on_cancel(on_cancel)
    queued = rig.store.create(new_job()).record.id
    running, _ = _start(rig)
    rig.store.cancel(queued)
    rig.store.cancel(running)
    assert arrived.wait(5)
    assert told == [running]


def test_a_closed_feed_ends_its_watchers_and_takes_no_new_ones(rig: Rig) -> None:
    job_id, _ = _start(rig)
    with closing(watch(rig.store, rig.feed, job_id, after=2, keepalive_s=0.01)) as events:
        assert next(events) is None
        rig.feed.close()
        rig.feed.close()
        with pytest.raises(StoreUnavailable):
            eventually(lambda: next(events))
    with pytest.raises(StoreUnavailable), closing(rig.feed.subscribe(job_id)) as subscription:
        subscription.next(1)
