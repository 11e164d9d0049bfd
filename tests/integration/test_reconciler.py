"""What stalls is mended: by one process at a time, whatever fails meanwhile."""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import pytest

from omnirt_tasks.broker_lists import celery_waiting
from omnirt_tasks.celery_app import broker_prefix, make_app
from omnirt_tasks.contract import JobState, Priority
from omnirt_tasks.errors import StorageError, StoreUnavailable
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.effects import PROMOTE_AFTER_S
from omnirt_tasks.jobs.housekeeping import Turn, everyones_turn
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.reconciler import Reconciler, redis_age, redis_turn
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Reconciled, Requeue, StoredJob, WakeUp
from omnirt_tasks.settings import Settings
from omnirt_tasks.tasks import send_job
from tests.support.jobs import ManualClock, claimed, failed, new_job, pass_redis_time
from tests.support.waiting import eventually

PERIOD_S = 0.05


@dataclass
class Surroundings:
    """What a reconciler acts on, beside the store, and what it did there."""

    in_broker: set[WakeUp] = field(default_factory=set)
    sent: list[WakeUp] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    fails: str | None = None

    def resend(self, wake_up: WakeUp) -> None:
        if self.fails:
            raise StorageError(self.fails)
        self.sent.append(wake_up)

    def remove_files(self, job: StoredJob) -> None:
        self.removed.append(job.record.id)


def _greater(value: Callable[[], int], than: int) -> bool:
    return value() > than


def _reconciler(
    store: JobStore,
    around: Surroundings,
    *,
    turn: Turn = everyones_turn,
    lease_ttl_s: float = 0.0,
    store_age_s: Callable[[], float] = lambda: float("inf"),
) -> Reconciler:
    return Reconciler(
        store,
        every_s=PERIOD_S,
        unclaimed_after_s=0.03,
        resend=around.resend,
        waiting_in_broker=lambda _: around.in_broker,
        remove_files=around.remove_files,
        turn=turn,
        lease_ttl_s=lease_ttl_s,
        store_age_s=store_age_s,
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryJobStore:
    return MemoryJobStore(job_ttl_s=0.01, now_ms=clock)


@pytest.fixture
def client(settings: Settings) -> Iterator[Any]:
    client = connect(settings.redis_url)
    yield client
    client.close()


# ---------------------------------------------------------------- one round


def test_a_job_whose_worker_died_is_sent_again(store: MemoryJobStore, clock: ManualClock) -> None:
    around = Surroundings()
    job_id = store.create(new_job()).record.id
    store.claim(job_id, worker_id="w", lease_ttl_ms=1)
    clock.pass_time(2)
    assert _reconciler(store, around).round()
    assert around.sent == [WakeUp(job_id, "cpu-shapes")]
    assert store.get(job_id).record.state is JobState.QUEUED


def test_an_unclaimed_job_is_sent_again_unless_its_message_still_waits(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    waits, lost = (store.create(new_job()).record.id for _ in range(2))
    around = Surroundings(in_broker={WakeUp(waits, "cpu-shapes")})
    clock.pass_time(30)
    reconciler = _reconciler(store, around)
    reconciler.round()
    reconciler.round()
    assert around.sent == [WakeUp(lost, "cpu-shapes")]
    around.in_broker.clear()
    clock.pass_time(30)
    reconciler.round()
    assert set(around.sent[1:]) == {WakeUp(waits, "cpu-shapes"), WakeUp(lost, "cpu-shapes")}
    assert len(around.sent) == 3


def test_a_job_that_has_moved_up_is_sent_though_its_old_message_still_waits(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    around = Surroundings()
    job_id = store.create(new_job(priority=Priority.LOW)).record.id
    low, normal, high = (WakeUp(job_id, "cpu-shapes", priority) for priority in reversed(Priority))
    around.in_broker.add(low)
    reconciler = _reconciler(store, around)
    for moved_up in (normal, high):
        clock.pass_time(round(PROMOTE_AFTER_S * 1000))
        reconciler.round()
        assert around.sent.pop() == moved_up
        around.in_broker.add(moved_up)
        clock.pass_time(30)
        reconciler.round()
        assert not around.sent  # its new message waits


def test_a_job_whose_new_message_was_lost_is_sent_again_though_the_old_one_waits(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    job_id = store.create(new_job(priority=Priority.LOW)).record.id
    around = Surroundings(in_broker={WakeUp(job_id, "cpu-shapes", Priority.LOW)})
    reconciler = _reconciler(store, around)
    clock.pass_time(round(PROMOTE_AFTER_S * 1000))
    for _ in range(2):
        reconciler.round()
        assert around.sent.pop() == WakeUp(job_id, "cpu-shapes", Priority.NORMAL)
        clock.pass_time(30)


def test_the_parts_of_a_job_are_sent_again_each_for_itself(store: MemoryJobStore, clock: ManualClock) -> None:
    job = store.create(new_job(parts=3))
    around = Surroundings(in_broker={WakeUp(job.parts[2], "cpu-shapes")})
    claimed(store, job.parts[0], lease_ttl_ms=1)
    clock.pass_time(30)
    _reconciler(store, around).round()
    assert sorted(wake_up.job_id for wake_up in around.sent) == list(job.parts[:2])


def test_a_job_that_was_accepted_without_a_message_gets_one(store: MemoryJobStore, clock: ManualClock) -> None:
    around = Surroundings()
    job_id = store.create(new_job()).record.id  # its gateway was killed before it sent anything
    reconciler = _reconciler(store, around)
    reconciler.round()
    assert not around.sent  # it may be on its way
    clock.pass_time(30)
    reconciler.round()
    assert around.sent == [WakeUp(job_id, "cpu-shapes")]


def test_a_job_that_waits_for_its_retry_is_sent_when_it_is_due_and_not_before(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    around = Surroundings()
    job_id = store.create(new_job()).record.id
    store.give_back(claimed(store, job_id), Requeue("error", retry=True, delay_ms=1_000))
    reconciler = _reconciler(store, around)
    for _ in range(9):
        clock.pass_time(111)
        reconciler.round()
    assert not around.sent
    clock.pass_time(1)
    reconciler.round()
    assert around.sent == [WakeUp(job_id, "cpu-shapes")]


def test_a_job_that_waits_past_its_deadline_has_failed_and_is_not_sent(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    around = Surroundings()
    job_id = store.create(new_job(deadline_s=1.0)).record.id
    clock.pass_time(1_000)
    _reconciler(store, around).round()
    record = store.get(job_id).record
    assert record.error is not None
    assert (record.state, record.error.code) == (JobState.FAILED, "timeout")
    assert not around.sent


# ---------------------------------------------------------------- after an outage


class _AwayBroker(Surroundings):
    """Where no message can be sent."""

    def resend(self, wake_up: WakeUp) -> None:
        raise StoreUnavailable("The broker does not answer.")


class AwayStore(MemoryJobStore):
    """A store in memory that is away when told so."""

    away = False

    def reconcile(self, *, unclaimed_after_ms: int, spare_leases: bool = False) -> Reconciled:
        if self.away:
            raise StoreUnavailable("The job store does not answer.")
        return super().reconcile(unclaimed_after_ms=unclaimed_after_ms, spare_leases=spare_leases)


def test_after_an_outage_no_lease_expires_until_its_holder_could_renew_it(clock: ManualClock) -> None:
    store, around = AwayStore(now_ms=clock), Surroundings()
    job_id = store.create(new_job()).record.id
    claimed(store, job_id, lease_ttl_ms=1)
    reconciler = _reconciler(store, around, lease_ttl_s=0.1)
    store.away = True
    with pytest.raises(StoreUnavailable):
        reconciler.round()
    store.away = False
    clock.pass_time(2)
    began = monotonic()
    reconciler.round()
    spared = store.get(job_id).record.state is JobState.RUNNING

    def expired() -> bool:
        reconciler.round()
        return store.get(job_id).record.state is JobState.QUEUED

    eventually(expired)
    assert spared
    assert monotonic() - began >= 0.1


def test_a_store_that_hung_was_away_although_it_refused_nobody(store: MemoryJobStore, clock: ManualClock) -> None:
    hangs_s = [0.06, 0.0]

    @contextmanager
    def turn() -> Iterator[bool]:
        time.sleep(hangs_s.pop(0))
        yield True

    job_id = store.create(new_job()).record.id
    claimed(store, job_id, lease_ttl_ms=1)
    clock.pass_time(2)
    reconciler = _reconciler(store, Surroundings(), turn=turn, lease_ttl_s=0.15)
    reconciler.round()
    assert store.get(job_id).record.state is JobState.RUNNING  # its holder hung as well
    time.sleep(0.15)
    reconciler.round()
    assert store.get(job_id).record.state is JobState.QUEUED


def test_a_broker_that_is_away_by_itself_spares_no_lease(store: MemoryJobStore, clock: ManualClock) -> None:
    away = _AwayBroker()
    lost = store.create(new_job()).record.id
    dead = store.create(new_job()).record.id
    claimed(store, dead, lease_ttl_ms=40)
    reconciler = _reconciler(store, away, lease_ttl_s=60)
    clock.pass_time(30)
    with pytest.raises(StoreUnavailable):
        reconciler.round()  # over the message of the one that is lost
    clock.pass_time(20)
    with pytest.raises(StoreUnavailable):
        reconciler.round()
    assert store.get(dead).record.state is JobState.QUEUED
    assert store.get(lost).record.state is JobState.QUEUED


def test_a_store_that_has_only_just_come_up_lets_no_lease_expire_yet(store: MemoryJobStore, clock: ManualClock) -> None:
    around = Surroundings()
    job_id = store.create(new_job()).record.id
    claimed(store, job_id, lease_ttl_ms=1)
    clock.pass_time(2)
    _reconciler(store, around, lease_ttl_s=60, store_age_s=lambda: 1.0).round()
    assert store.get(job_id).record.state is JobState.RUNNING
    _reconciler(store, around, lease_ttl_s=60, store_age_s=lambda: 61.0).round()
    assert store.get(job_id).record.state is JobState.QUEUED


def test_the_store_is_asked_for_its_age_once(store: MemoryJobStore) -> None:
    asked: list[float] = []

    def age_s() -> float:
        asked.append(1.0)
        return 1.0

    reconciler = _reconciler(store, Surroundings(), lease_ttl_s=60, store_age_s=age_s)
    for _ in range(3):
        reconciler.round()
    assert len(asked) == 1


def test_redis_tells_how_long_it_has_been_up(client: Any) -> None:
    age_s = redis_age(client)()
    assert 0 <= age_s <= client.info("server")["uptime_in_seconds"]


# ---------------------------------------------------------------- the thread


def test_the_thread_mends_on_real_redis(client: Any, settings: Settings) -> None:
    store = RedisJobStore(client, prefix=settings.key_prefix, job_ttl_s=0.01)
    around = Surroundings()
    lapsed, unclaimed, expired = (store.create(new_job()).record.id for _ in range(3))
    store.claim(lapsed, worker_id="w", lease_ttl_ms=1)
    store.commit(claimed(store, expired), failed())
    turn = redis_turn(client, prefix=settings.key_prefix, every_s=PERIOD_S)
    with closing(_reconciler(store, around, turn=turn)) as reconciler:
        reconciler.start()
        eventually(lambda: {wake_up.job_id for wake_up in around.sent} >= {lapsed, unclaimed})
        eventually(lambda: around.removed == [expired])


def test_a_fault_is_logged_once_per_streak_and_survived(
    store: MemoryJobStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rounds = 0

    def turn() -> AbstractContextManager[bool]:
        nonlocal rounds
        rounds += 1
        return nullcontext(True)

    around = Surroundings(fails="the broker is away")
    job_id = store.create(new_job()).record.id
    with closing(_reconciler(store, around, turn=turn)) as reconciler:
        reconciler.start()
        for _ in range(3):
            seen = rounds
            clock.pass_time(40)
            eventually(partial(_greater, lambda: rounds, seen))
        around.fails = None
        clock.pass_time(40)
        eventually(lambda: around.sent)
        eventually(lambda: "works again" in caplog.text)
    assert around.sent[0] == WakeUp(job_id, "cpu-shapes")
    assert caplog.text.count("a round of reconciling failed") == 1


# ---------------------------------------------------------------- whose turn it is


def test_of_many_processes_one_acts_per_period(client: Any, settings: Settings) -> None:
    acting = threading.Semaphore(1)
    turn = redis_turn(client, prefix=settings.key_prefix, every_s=2.0)
    start = threading.Barrier(8)

    def act(_: int) -> bool:
        start.wait(10)
        with turn() as mine:
            if mine:
                assert acting.acquire(blocking=False)
                acting.release()
            return mine

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(act, range(8))) == 1
    with turn() as mine:
        assert not mine  # the period is not over


def test_the_turn_passes_on_when_its_period_is_over(client: Any, settings: Settings) -> None:
    turn = redis_turn(client, prefix=settings.key_prefix, every_s=0.02)
    with turn() as mine:
        assert mine
    pass_redis_time(client, 20)
    with turn() as mine:
        assert mine


def test_the_turn_of_a_process_that_died_passes_on(
    client: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnirt_tasks.jobs.reconciler.ROUND_LIMIT_S", 0.05)
    turn = redis_turn(client, prefix=settings.key_prefix, every_s=0.01)
    with turn() as mine:  # it never gets to the end of its round in time
        assert mine
        with turn() as second:
            assert not second
        pass_redis_time(client, 60)
        with turn() as second:
            assert second
            late = client.get(f"{settings.key_prefix}:reconciler")
    assert late is not None  # and what it lost it does not take from the other


# ---------------------------------------------------------------- the broker's lists


def test_the_messages_that_wait_in_celerys_lists_are_found(settings: Settings, client: Any) -> None:
    queue = f"{settings.key_prefix}-cpu-shapes"
    with make_app(settings) as app:
        app.send_task("omnirt.generate", args=["one"], task_id="one", queue=queue)
        app.send_task("omnirt.generate", args=["two"], task_id="two", queue=queue, priority=5)
        prefix = broker_prefix(settings)
        client.lpush(prefix + queue, "no message of Celery's", '{"headers": null}', "[]", b"\x80\x04 pickled")
        client.lpush(prefix + queue, "[" * 100_000)
        waiting = celery_waiting(client, prefix=prefix)
        send_job(app, WakeUp("three", queue, Priority.LOW))
        assert waiting(queue) == {
            WakeUp("one", queue, Priority.HIGH),
            WakeUp("two", queue, Priority.NORMAL),
            WakeUp("three", queue, Priority.LOW),
        }
        assert waiting(f"{queue}-other") == frozenset()


def test_a_long_list_is_not_read_again_at_once(settings: Settings, client: Any) -> None:
    prefix = f"{settings.key_prefix}:"
    lines = [f'{{"headers": {{"id": "{number}"}}}}' for number in range(2_000)]
    client.rpush(f"{prefix}long", *lines)
    client.rpush(f"{prefix}short", lines[0])
    waiting = celery_waiting(client, prefix=prefix)
    assert len(waiting("long")) == 2_000
    assert len(waiting("short")) == 1
    client.delete(f"{prefix}long", f"{prefix}short")
    assert len(waiting("long")) == 2_000
    eventually(lambda: not waiting("short"))


def test_what_was_read_of_a_list_is_not_kept_past_its_time(settings: Settings, client: Any) -> None:
    prefix = f"{settings.key_prefix}:"
    client.rpush(f"{prefix}short", '{"headers": {"id": "1"}}')
    waiting = celery_waiting(client, prefix=prefix)
    read = weakref.ref(waiting("short"))

    def gone() -> bool:
        waiting("other")
        return read() is None

    eventually(gone)
