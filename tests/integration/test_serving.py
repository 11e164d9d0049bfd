"""What one worker process runs beside Celery, in this process: on a real store, with the stub for a device."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from omnirt_tasks.registry import discover
from omnirt_tasks.settings import Settings
from tests.support.job_system import STUB_QUEUE
from workers.devices import take_device
from workers.plan import plan_for_queues
from workers.serving import Serving

DEVICE = "cpu-stub:0"
THREADS = 8


class Worker:
    """A Serving, and how often it said that its device is stuck."""

    def __init__(self, settings: Settings) -> None:
        self.stuck = 0
        self.device = take_device("cpu-stub", (DEVICE,), wanted=None, run_dir=settings.run_dir)
        self.serving = Serving(
            settings,
            plan_for_queues([STUB_QUEUE], discover(), settings),
            self.device,
            queues=(STUB_QUEUE,),
            worker_id="w1",
            concurrency=THREADS,
            resend=lambda job_id, queue: None,
            on_ended=self._note,
        )

    def _note(self, status: int) -> None:
        self.stuck += 1

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

    assert worker.stuck == 1


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
