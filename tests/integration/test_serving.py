"""What one worker process runs beside Celery, in this process: on a real store, with the stub for a device."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.jobs.fleet import MemoryFleet
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import Settings
from tests.support.job_system import STUB_QUEUE
from tests.support.jobs import new_job
from tests.support.waiting import eventually
from workers.devices import take_device
from workers.plan import plan_for_queues
from workers.serving import EXIT_STUCK, Serving, _served_beside

DEVICE = "cpu-stub:0"
THREADS = 8


class Consuming:
    """Consumption that notes what it is told, and takes nothing."""

    def __init__(self) -> None:
        self.admitted: list[int] = []
        self.ends: list[int] = []

    def admit(self, messages: int) -> None:
        self.admitted.append(messages)

    def end(self, status: int) -> None:
        self.ends.append(status)

    def has_room(self) -> bool:
        return False

    def taken(self) -> int:
        return 0

    def queues(self) -> Sequence[str]:
        return ()

    def restart(self) -> bool:
        return True


class Worker:
    """A Serving whose consumption is none."""

    def __init__(self, settings: Settings) -> None:
        self.consumption = Consuming()
        self.device = take_device("cpu-stub", (DEVICE,), wanted=None, run_dir=settings.run_dir)
        self.serving = Serving(
            settings,
            plan_for_queues([STUB_QUEUE], discover(), settings),
            self.device,
            queues=(STUB_QUEUE,),
            worker_id="w1",
            concurrency=THREADS,
            resend=lambda _: None,
            consumption=self.consumption,
        )

    def close(self) -> None:
        self.serving.close()
        self.device.close()


@pytest.fixture
def worker(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    # A stuck worker ends its process, which is the tests' own here.
    monkeypatch.setattr("workers.serving.faulthandler.dump_traceback_later", lambda *_, **__: None)
    worker = Worker(settings)
    yield worker
    worker.close()


def test_jobs_that_are_abandoned_at_one_instant_end_their_worker_once(worker: Worker) -> None:
    together = threading.Barrier(THREADS)

    def slowly(frame: FrameType, event: str, argument: object) -> Any:
        time.sleep(0.002)  # at each line, so that the threads meet between any two
        return slowly if frame.f_code is Serving._stick.__code__ else None

    def abandon() -> None:
        together.wait(20)
        sys.settrace(slowly)
        worker.serving._stick("a device call does not come back")

    threads = [threading.Thread(target=abandon) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert worker.consumption.ends == [EXIT_STUCK]


def test_what_a_killed_predecessor_left_on_the_device_is_removed(settings: Settings) -> None:
    scratch = settings.run_dir / "scratch"
    left, neighbours = (scratch / name / "job.1" / "inputs" for name in ("cpu-stub-0", "cpu-stub-1"))
    for folder in (left, neighbours):
        folder.mkdir(parents=True)
        (folder / "image").write_bytes(b"a picture of somebody's")

    worker = Worker(settings)

    try:
        assert list(Path(scratch / "cpu-stub-0").iterdir()) == []
        assert (neighbours / "image").is_file(), "another device's scratch is its worker's"
    finally:
        worker.close()


def test_a_worker_takes_nothing_while_a_job_needs_its_device_alone_nor_once_it_leaves(worker: Worker) -> None:
    worker.serving._set_crowded(True)
    worker.serving._set_available(True)  # a device that comes back meanwhile makes no room
    worker.serving._set_crowded(False)
    worker.serving.leave(grace_s=60)
    eventually(lambda: worker.consumption.admitted[-1] == 0)
    worker.serving._set_available(True)

    assert worker.consumption.admitted == [THREADS, 0, 0, THREADS, 0, 0]


@pytest.mark.parametrize(
    ("worker_id", "queue", "models", "serves"),
    [
        ("w2", STUB_QUEUE, ("stub",), True),
        ("w1", STUB_QUEUE, ("stub",), False),
        ("w2", "cpu-shapes", ("stub",), False),
        ("w2", STUB_QUEUE, ("shapes",), False),
    ],
    ids=["another", "itself", "of another queue", "of another model"],
)
def test_a_job_is_served_beside_by_a_live_worker_of_its_queue_and_model(
    worker_id: str, queue: str, models: tuple[str, ...], serves: bool
) -> None:
    fleet = MemoryFleet()
    job = MemoryJobStore().create(new_job("j1", queue=STUB_QUEUE, model="stub"))
    capability = WorkerCapability(
        worker_id=worker_id, backend="cpu-stub", device=DEVICE, queues=(queue,), models=models
    )

    fleet.publish(capability, ttl_ms=60_000)

    assert _served_beside(fleet, "w1", job) is serves


def test_a_drained_worker_ends_once_it_is_idle(worker: Worker) -> None:
    worker.serving.drain(grace_s=60)
    worker.serving.drain(grace_s=60)

    assert worker.serving.leaving
    eventually(lambda: worker.consumption.ends)
    assert worker.consumption.ends == [0]


def test_a_worker_whose_consumer_hears_nothing_gives_its_jobs_back_and_is_ended(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr("workers.serving.faulthandler.dump_traceback", lambda *_, **__: None)
    monkeypatch.setattr(
        "workers.serving.os._exit", lambda status: ended.append((status, worker.serving.runner.running))
    )

    worker.serving._lose_consumption(hears=False)

    assert ended == [(EXIT_STUCK, 0)]
    assert worker.serving.runner.run("a job whose message came too late") is None
