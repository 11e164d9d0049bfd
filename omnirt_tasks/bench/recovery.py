"""How long work stands still: for a job whose worker or device was killed, and for all when Redis was away.

Every process is real, bare and with default settings; what was killed is replaced before the next time. A kill comes
at any moment between two renewals of the job's lease.
"""

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from omnirt_tasks import requests
from omnirt_tasks.bench.figures import Row, Table, percentile
from omnirt_tasks.bench.submit import OURS, running_server
from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.client import Client
from omnirt_tasks.contract import JobState, WorkerCapability
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.errors import OmnirtError, OperatorError
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.fleet import RedisFleet
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.settings import load_settings
from omnirt_tasks.system import hermetic_environment, worker_command

QUEUE = "cpu-stub-stub"
# Longer than any recovery, and ended by a cancel.
LONG = requests.text2image(model="stub", prompt="a", backend="cpu-stub", num_inference_steps=200, step_ms=200)
SHORT = requests.text2image(model="stub", prompt="a", backend="cpu-stub", num_inference_steps=2)
KILLED_AFTER_S = 2.0
OUTAGE_S = (1.0, 5.0)
GIVE_UP_S = 120.0
POLL_S = 0.005
WORKER_GRACE_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One way to kill, with so many workers up; `bar` is what was promised for it."""

    name: str
    bar: str
    workers: int
    once: Callable[["Fleet"], float]
    placement: str = "auto"


class Fleet:
    """A broker, a gateway, and stub workers that are killed and replaced."""

    def __init__(self, stack: ExitStack, folder: Path, case: Case) -> None:
        """Start everything; `stack` ends it."""
        self.broker = stack.enter_context(EmbeddedBroker(data_dir=folder / "broker"))
        own = {
            "key_prefix": "bench-recovery",
            "data_dir": f"{folder}/data",
            "run_dir": f"{folder}/run",
            "allow_stub": "true",
            "cpu_devices": str(case.workers),
            "placement": case.placement,
        }
        settings = load_settings(redis_url=self.broker.url, **own)
        self._environment = hermetic_environment(redis_url=self.broker.url, **own)
        redis = connect(settings.redis_url)
        stack.callback(redis.close)
        self.store = RedisJobStore(redis, prefix=settings.key_prefix, job_ttl_s=settings.job_ttl_s)
        self._fleet = RedisFleet(redis, prefix=settings.key_prefix)
        port = stack.enter_context(running_server(OURS, self.broker.url, folder, **own))
        self.client = stack.enter_context(Client(f"http://127.0.0.1:{port}"))
        self._workers: list[ChildProcess] = []
        stack.callback(self._stop_workers)
        for _ in range(case.workers):
            self.start_worker()
        for worker in self._workers:
            self._ready(worker)

    def begin(self) -> tuple[str, ChildProcess, WorkerCapability]:
        """Start a long job: its id, and the worker that runs it."""
        job_id = self.client.submit(LONG).id
        job = _waited_for(lambda: job if (job := self.store.get(job_id).record).state is JobState.RUNNING else None)
        told = _waited_for(lambda: next((one for one in self._fleet.live() if one.worker_id == job.worker_id), None))
        worker = next(worker for worker in self._workers if os.getpgid(told.pid) == worker.pid)
        return job_id, worker, told

    def next_attempt_s(self, job_id: str) -> float:
        """How long it takes from now until the job's second attempt runs; the job is cancelled then."""
        began_s = time.perf_counter()
        _waited_for(lambda: self.store.get(job_id).record.attempt == 2)
        took_s = time.perf_counter() - began_s
        self.store.cancel(job_id)
        _waited_for(lambda: self.store.get(job_id).record.finished)
        return took_s

    def start_worker(self) -> ChildProcess:
        """One worker more."""
        command = worker_command([QUEUE], "WARNING")
        worker = ChildProcess("worker", command, env=self._environment, grace_s=WORKER_GRACE_S)
        self._workers.append(worker)
        return worker

    def replace(self, worker: ChildProcess) -> None:
        """Start another in the place of one that was killed, and wait until it serves."""
        self._forget(worker)
        self._ready(self.start_worker())

    def start_again(self, worker: ChildProcess) -> None:
        """Start another in its place, as a supervisor does, and do not wait."""
        self._forget(worker)
        self.start_worker()

    def _forget(self, worker: ChildProcess) -> None:
        worker.stop()
        self._workers.remove(worker)

    def _ready(self, worker: ChildProcess) -> None:
        def serves() -> bool:
            if worker.exit_code is not None:
                raise OperatorError(f"A worker of the bench ended: {' '.join(worker.last_lines)}")
            return any(_group_of(told.pid) == worker.pid for told in self._fleet.live())

        _waited_for(serves)

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.ask_to_stop()
        for worker in self._workers:
            worker.stop()


def measure(times: int, restarts: int, outages: int) -> Iterator[int | Table]:
    """Kill workers and devices `times` times each, a lone worker `restarts` times, and Redis `outages` times.

    Yields how many are done, then the table.
    """
    counts = dict.fromkeys(CASES, times) | {LONE_WORKER: restarts, REDIS_AWAY: outages}
    rows: list[Row] = []
    done = 0
    for case, count in counts.items():
        taken: list[float] = []
        with _running(case) as fleet:
            for _ in range(count):
                taken.append(case.once(fleet))
                done += 1
                yield done
        figures = (percentile(taken, 50), percentile(taken, 99), max(taken))
        rows.append(Row(case.name, (str(count), *(f"{figure:.2f}" for figure in figures), case.bar)))
    yield Table(
        title="Recovery",
        columns=("times", "p50 s", "p99 s", "most s", "bar"),
        rows=tuple(rows),
        note=(
            "Stub jobs, embedded broker (fsync always), default settings. From the kill to `job_started` of the next "
            "attempt; for Redis from its return, after 1 to 5 s, to the end of the first job that is submitted then."
        ),
    )


def _kill_worker(fleet: Fleet) -> float:
    job_id, worker, _ = fleet.begin()
    time.sleep(random.uniform(0, KILLED_AFTER_S))  # noqa: S311
    worker.kill()
    took_s = fleet.next_attempt_s(job_id)
    fleet.replace(worker)
    return took_s


def _kill_lone_worker(fleet: Fleet) -> float:
    job_id, worker, _ = fleet.begin()
    worker.kill()
    began_s = time.perf_counter()
    fleet.start_again(worker)
    return time.perf_counter() - began_s + fleet.next_attempt_s(job_id)


def _kill_device(fleet: Fleet) -> float:
    job_id, _, told = fleet.begin()
    devices = [
        process
        for process in psutil.Process(told.pid).children(recursive=True)
        if process.cmdline()[1:3] == ["-m", "workers.device_child"]
    ]
    for device in devices:
        device.send_signal(signal.SIGKILL)
    return fleet.next_attempt_s(job_id)


def _take_redis_away(fleet: Fleet) -> float:
    assert fleet.broker.child is not None
    fleet.broker.child.kill()
    time.sleep(random.uniform(*OUTAGE_S))  # noqa: S311
    fleet.broker.stop()
    fleet.broker.start()
    began_s = time.perf_counter()
    job_id = _waited_for(lambda: _accepted(fleet.client))
    job = fleet.client.wait(job_id, GIVE_UP_S)
    if job.state is not JobState.SUCCEEDED:
        raise OperatorError(f"A job of the bench ended {job.state}: {job.error}")
    return time.perf_counter() - began_s


CASES = (
    Case("worker killed, another is up", "10 s at p99", 2, _kill_worker),
    Case("device's process killed, another worker is up", "2 s", 2, _kill_device, "process"),
    Case("device's process killed, no other worker", "2 s and its start", 1, _kill_device, "process"),
)
LONE_WORKER = Case("the only worker killed, and started again at once", "", 1, _kill_lone_worker)
REDIS_AWAY = Case("Redis killed, and back", "15 s", 2, _take_redis_away)


def steps(times: int, restarts: int, outages: int) -> int:
    """How many times something is killed in all."""
    return len(CASES) * times + restarts + outages


@contextmanager
def _running(case: Case) -> Iterator[Fleet]:
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="omnirt-bench-", ignore_cleanup_errors=True)
        yield Fleet(stack, Path(stack.enter_context(folder)), case)


def _accepted(client: Client) -> str | None:
    try:
        return client.submit(SHORT).id
    except OmnirtError:  # the gateway has not found its Redis again yet
        return None


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _waited_for(probe: Callable[[], T | None]) -> T:
    """The first value of `probe` that is true. Raises OperatorError when none comes."""
    deadline = time.monotonic() + GIVE_UP_S
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise OperatorError(f"Nothing came of it within {GIVE_UP_S:.0f} s; the bench cannot go on.")
        time.sleep(POLL_S)
    return value
