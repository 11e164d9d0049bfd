"""What nobody needs any more is removed, whatever fails meanwhile, and holds up no recovery."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from threading import Event

import pytest

from omnirt_tasks.contract import JobState
from omnirt_tasks.errors import JobNotFound, StorageError, StoreUnavailable
from omnirt_tasks.jobs.housekeeping import Chore, ExpirySweep, Housekeeper
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.reconciler import Reconciler
from omnirt_tasks.jobs.values import StoredJob, WakeUp
from tests.support.jobs import ManualClock, new_job
from tests.support.waiting import eventually


class Storage:
    """Removes files, unless it is told not to."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.stuck: set[str] = set()

    def remove(self, job: StoredJob) -> None:
        if job.record.id in self.stuck:
            raise StorageError("The storage is away.")
        self.removed.append(job.record.id)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryJobStore:
    return MemoryJobStore(job_ttl_s=0.01, now_ms=clock)


def _cancelled(store: MemoryJobStore) -> str:
    job_id = store.create(new_job()).record.id
    store.cancel(job_id)
    return job_id


# ---------------------------------------------------------------- expired jobs


def test_an_expired_job_loses_its_files_and_then_its_record(store: MemoryJobStore, clock: ManualClock) -> None:
    storage, job_id = Storage(), _cancelled(store)
    clock.pass_time(10)
    ExpirySweep(store, storage.remove)()
    assert storage.removed == [job_id]
    with pytest.raises(JobNotFound):
        store.get(job_id)


def test_a_job_whose_files_cannot_be_removed_keeps_its_record_and_stops_no_other(
    store: MemoryJobStore, clock: ManualClock
) -> None:
    storage, stuck, other = Storage(), _cancelled(store), _cancelled(store)
    clock.pass_time(10)
    storage.stuck = {stuck}
    sweep = ExpirySweep(store, storage.remove)
    with pytest.raises(StorageError):
        sweep()
    assert storage.removed == [other]
    assert store.get(stuck).record.finished
    storage.stuck = set()
    sweep()
    assert storage.removed == [other, stuck]


def test_jobs_whose_files_cannot_be_removed_do_not_stand_in_the_way_of_the_others(
    store: MemoryJobStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnirt_tasks.jobs.housekeeping.SWEEP_LIMIT", 2)
    storage, others = Storage(), list[str]()
    for number in range(7):
        job_id = _cancelled(store)
        clock.pass_time(1)
        if number < 3:
            storage.stuck.add(job_id)
        else:
            others.append(job_id)
    clock.pass_time(10)
    housekeeper = Housekeeper([Chore("Removing", ExpirySweep(store, storage.remove), every_s=0)])
    for _ in range(6):
        housekeeper.round()
    assert storage.removed == others
    storage.stuck.clear()
    for _ in range(4):
        housekeeper.round()
    assert not store.expired()


# ---------------------------------------------------------------- chores


def test_a_chore_is_done_at_once_and_then_when_its_time_comes(store: MemoryJobStore) -> None:
    often, seldom = list[int](), list[int]()
    housekeeper = Housekeeper(
        [Chore("Often", lambda: often.append(1), every_s=0), Chore("Seldom", lambda: seldom.append(1), every_s=3_600)]
    )
    for _ in range(3):
        housekeeper.round()
    assert (len(often), len(seldom)) == (3, 1)


def test_a_chore_is_left_to_the_process_whose_turn_it_is() -> None:
    done = list[int]()

    def not_mine() -> AbstractContextManager[bool]:
        return nullcontext(False)

    Housekeeper([Chore("Removing", lambda: done.append(1), 0, not_mine)]).round()
    assert not done


def test_a_chore_that_fails_is_logged_once_in_a_row_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    faults, others = [OSError("the disk is full")] * 2, list[int]()

    def tidy() -> None:
        if faults:
            raise faults.pop()

    housekeeper = Housekeeper([Chore("Tidying", tidy, 0), Chore("Sweeping", lambda: others.append(1), 0)])
    for _ in range(4):
        housekeeper.round()
    assert len(others) == 4
    assert caplog.text.count("Tidying failed; further failures in a row are not logged") == 1
    assert caplog.text.count("Tidying works again") == 1


def test_a_store_that_is_away_is_the_reconcilers_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    def away() -> None:
        raise StoreUnavailable("The job store does not answer.")

    Housekeeper([Chore("Tidying", away, 0)]).round()
    assert not caplog.text


def test_a_storage_that_hangs_holds_up_no_recovery(store: MemoryJobStore, clock: ManualClock) -> None:
    _cancelled(store)
    clock.pass_time(10)
    hangs, goes_on, sent = Event(), Event(), list[str]()

    def remove(_: StoredJob) -> None:
        hangs.set()
        assert goes_on.wait(10)

    with closing(_reconciler(store, lambda wake_up: sent.append(wake_up.job_id), remove)) as reconciler:
        reconciler.start()
        assert hangs.wait(10)
        lost = store.create(new_job()).record.id
        clock.pass_time(1)
        eventually(lambda: lost in sent)
        assert store.get(lost).record.state is JobState.QUEUED
        goes_on.set()


def _reconciler(
    store: MemoryJobStore, resend: Callable[[WakeUp], None], remove_files: Callable[[StoredJob], None]
) -> Reconciler:
    return Reconciler(
        store,
        every_s=0.01,
        unclaimed_after_s=0.001,
        resend=resend,
        waiting_in_broker=lambda _: frozenset(),
        remove_files=remove_files,
        turn=lambda: nullcontext(True),
    )
