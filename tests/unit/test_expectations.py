"""What a gateway asks the store for to tell when waiting jobs will be done."""

from collections import Counter

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.values import QueueDepth, ServiceTime, StoredJob
from tests.support.jobs import new_job
from web.expectations import TOLD_ANEW_S, Expectations

QUEUES = ("cpu-stub-stub", "cpu-stub-other")


class AskedStore(MemoryJobStore):
    """A store that counts how often it is asked of each queue, and has known times."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def service_times(self, queue: str) -> list[ServiceTime]:
        self.asked[queue] += 1
        return [ServiceTime("any", 2_000)]

    def depth(self, queue: str) -> QueueDepth:
        return QueueDepth(waiting=9, running=1)


def workers(*concurrency: int) -> list[WorkerCapability]:
    return [
        WorkerCapability(worker_id=f"w{number}", backend="cpu-stub", device="d", queues=QUEUES, concurrency=at_once)
        for number, at_once in enumerate(concurrency)
    ]


def waiting_job(store: MemoryJobStore, queue: str = QUEUES[0]) -> StoredJob:
    return store.create(new_job(f"job of {queue}", queue=queue))


def test_however_often_it_is_asked_the_store_is_asked_once_a_second_for_each_queue() -> None:
    store, now_s = AskedStore(), [0.0]
    expectations = Expectations(store, clock=lambda: now_s[0])
    jobs = [waiting_job(store, queue) for queue in QUEUES]

    for _ in range(50):
        for job in jobs:
            assert expectations.eta(job, 3, workers(1)) is not None
    assert store.asked == Counter({QUEUES[0]: 1, QUEUES[1]: 1})

    now_s[0] += TOLD_ANEW_S
    expectations.eta(jobs[0], 3, workers(1))
    assert store.asked[QUEUES[0]] == 2


def test_the_more_jobs_the_workers_run_at_once_the_sooner() -> None:
    store = AskedStore()
    expectations, job = Expectations(store), waiting_job(store)

    one, two = (expectations.eta(job, 9, workers(*at_once)) for at_once in ((1,), (1, 4)))

    assert one is not None
    assert two is not None
    assert two.p50_s < one.p50_s


def test_where_no_worker_serves_the_queue_nothing_is_told_or_asked() -> None:
    store = AskedStore()

    assert Expectations(store).eta(waiting_job(store), 1, []) is None
    assert not store.asked
