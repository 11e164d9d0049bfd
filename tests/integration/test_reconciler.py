"""What stalls is mended: by one process at a time, whatever fails meanwhile."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from omnirt_tasks.celery_app import broker_prefix, make_app
from omnirt_tasks.contract import JobState
from omnirt_tasks.errors import JobNotFound, StorageError
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.reconciler import Reconciler, celery_waiting, redis_turn
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.store import JobStore, StoredJob
from omnirt_tasks.settings import Settings
from tests.support.jobs import LONG_MS, ManualClock, failed, new_job, pass_redis_time
from tests.support.waiting import eventually

PERIOD_S = 0.05


@dataclass
class Surroundings:
    """What a reconciler acts on, beside the store, and what it did there."""

    in_broker: set[str] = field(default_factory=set)
    sent: list[tuple[str, str]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    fails: str | None = None
    unremovable: set[str] = field(default_factory=set)

    def resend(self, job_id: str, queue: str) -> None:
        if self.fails:
            raise StorageError(self.fails)
        self.sent.append((job_id, queue))

    def remove_files(self, job: StoredJob) -> None:
        if self.fails == job.record.id or job.record.id in self.unremovable:
            raise StorageError("The storage is away.")
        self.removed.append(job.record.id)


def _greater(value: Callable[[], int], than: int) -> bool:
    return value() > than


def _everyones_turn() -> AbstractContextManager[bool]:
    return nullcontext(True)


def _reconciler(
    store: JobStore,
    around: Surroundings,
    *,
    turn: Callable[[], AbstractContextManager[bool]] = _everyones_turn,
    housekeeping: Callable[[], object] = lambda: None,
) -> Reconciler:
    return Reconciler(
        store,
        every_s=PERIOD_S,
        unclaimed_after_s=0.03,
        resend=around.resend,
        waiting_in_broker=lambda _: around.in_broker,
        remove_files=around.remove_files,
        turn=turn,
        housekeeping=housekeeping,
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
    assert around.sent == [(job_id, "cpu-shapes")]
    assert store.get(job_id).record.state is JobState.QUEUED


def test_an_unclaimed_job_is_sent_again_unless_its_message_still_waits(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    waits, lost = (store.create(new_job()).record.id for _ in range(2))
    around = Surroundings(in_broker={waits})
    clock.pass_time(30)
    reconciler = _reconciler(store, around)
    reconciler.round()
    reconciler.round()
    assert around.sent == [(lost, "cpu-shapes")]
    around.in_broker.clear()
    clock.pass_time(30)
    reconciler.round()
    assert sorted(around.sent[1:]) == sorted([(waits, "cpu-shapes"), (lost, "cpu-shapes")])


def test_an_expired_job_loses_its_files_and_then_its_record(store: MemoryJobStore, clock: ManualClock) -> None:
    around = Surroundings()
    job_id = store.create(new_job()).record.id
    store.cancel(job_id)
    clock.pass_time(10)
    _reconciler(store, around).round()
    assert around.removed == [job_id]
    with pytest.raises(JobNotFound):
        store.get(job_id)


def test_a_job_whose_files_cannot_be_removed_keeps_its_record_and_stops_no_other(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    stuck, other = (store.create(new_job()).record.id for _ in range(2))
    store.cancel(stuck)
    store.cancel(other)
    clock.pass_time(10)
    around = Surroundings(fails=stuck)
    assert _reconciler(store, around).round()
    assert around.removed == [other]
    assert store.get(stuck).record.finished
    around.fails = None
    _reconciler(store, around).round()
    assert around.removed == [other, stuck]


def test_jobs_whose_files_cannot_be_removed_do_not_stand_in_the_way_of_the_others(
    store: MemoryJobStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnirt_tasks.jobs.reconciler.SWEEP_LIMIT", 2)
    stuck, others = set[str](), list[str]()
    for number in range(7):
        job_id = store.create(new_job()).record.id
        store.cancel(job_id)
        clock.pass_time(1)
        if number < 3:
            stuck.add(job_id)
        else:
            others.append(job_id)
    clock.pass_time(10)
    around = Surroundings(unremovable=stuck)
    reconciler = _reconciler(store, around)
    for _ in range(6):
        reconciler.round()
    assert around.removed == others
    stuck.clear()
    for _ in range(4):
        reconciler.round()
    assert not store.expired()


@pytest.mark.parametrize("broken", ["sweep", "housekeeping"])
def test_a_storage_that_fails_slows_no_recovery_and_is_logged_once_per_streak(
    store: MemoryJobStore, clock: ManualClock, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    caplog.set_level(logging.INFO)
    expired = store.create(new_job()).record.id
    store.cancel(expired)
    clock.pass_time(10)
    lost = store.create(new_job()).record.id
    faults = [OSError("the disk is full")] * 2

    def tidy() -> None:
        if faults:
            raise faults.pop()

    around = Surroundings()
    reconciler = _reconciler(store, around, housekeeping=tidy if broken == "housekeeping" else lambda: None)
    reconciler._housekeeping_at = float("-inf")
    if broken == "sweep":
        around.unremovable = {expired}
    for number in range(1, 4):
        clock.pass_time(30)
        reconciler._housekeeping_at = float("-inf")
        if number == 3:
            around.unremovable = set()
        assert reconciler.round()  # and no fault goes on to the back-off
        assert around.sent == [(lost, "cpu-shapes")] * number
    assert caplog.text.count("further failures in a row are not logged") == 1
    assert caplog.text.count("works again") == 1


def test_housekeeping_is_done_about_once_a_minute(store: MemoryJobStore) -> None:
    calls: list[int] = []
    reconciler = _reconciler(store, Surroundings(), housekeeping=lambda: calls.append(1))
    for _ in range(3):
        reconciler.round()
    assert len(calls) == 1


# ---------------------------------------------------------------- the thread


def test_the_thread_mends_on_real_redis(client: Any, settings: Settings) -> None:
    store = RedisJobStore(client, prefix=settings.key_prefix, job_ttl_s=0.01)
    around = Surroundings()
    lapsed, unclaimed, expired = (store.create(new_job()).record.id for _ in range(3))
    store.claim(lapsed, worker_id="w", lease_ttl_ms=1)
    claim = store.claim(expired, worker_id="w", lease_ttl_ms=LONG_MS)
    assert claim is not None
    store.commit(claim.lease, failed())
    turn = redis_turn(client, prefix=settings.key_prefix, every_s=PERIOD_S)
    with closing(_reconciler(store, around, turn=turn)) as reconciler:
        reconciler.start()
        eventually(lambda: {job_id for job_id, _ in around.sent} >= {lapsed, unclaimed})
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
    assert around.sent[0] == (job_id, "cpu-shapes")
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
        waiting = celery_waiting(client, prefix=prefix)
        assert waiting(queue) == {"one", "two"}
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
