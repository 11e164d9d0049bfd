"""What holds of the `process` placement: a child that may die, and a host that goes on."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from omnirt_tasks.contract import EventName
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Recorder
from tests.support.outcomes import succeeded
from tests.support.processes import PROJECT
from tests.support.waiting import eventually
from workers.host import HostConfig, InterruptReason, RunFailed, RunInterrupted, RunLost
from workers.process_host import BACKOFF_MAX_S, ProcessHost, Recycling, backoff_s

START_TIMEOUT_S = 30.0
NEVER = Recycling()
STUB = HostConfig(backend="cpu-stub", device="cpu-stub:0", models=("stub",), folders={}, cache_size=2, concurrency=8)


class Kept:
    """A ProcessHost of the stub, with what it said."""

    def __init__(self, tmp_path: Path, config: HostConfig = STUB, recycling: Recycling = NEVER) -> None:
        self.lines: list[str] = []
        self.available: list[bool] = []
        self.unusable: list[str] = []
        self.host = ProcessHost(
            config,
            recycling=recycling,
            on_line=self.lines.append,
            on_available=self.available.append,
            on_unusable=lambda error: self.unusable.append(error.message),
        )
        self.bench = Bench(self.host, "stub", tmp_path)

    def ready(self) -> int:
        """The child's process id, once it takes orders."""
        eventually(lambda: self.host.health().ok, START_TIMEOUT_S, told=lambda: "\n".join(self.lines))
        pid = self.host.pid
        assert pid is not None
        return pid

    def replaced(self, pid: int) -> int:
        """The next child's process id."""
        return int(eventually(lambda: self.host.pid not in {None, pid} and self.host.pid, START_TIMEOUT_S) or 0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def build(config: HostConfig = STUB, recycling: Recycling = NEVER) -> Kept:
        made.append(Kept(tmp_path, config, recycling))
        return made[-1]

    yield build
    for kept in made:
        kept.host.close(5.0)


def test_runs_in_the_child_share_their_forwards_within_what_the_config_allows(
    make: Callable[..., Kept], tmp_path: Path
) -> None:
    table = tmp_path / "chunks.json"
    kept = make(replace(STUB, max_batch_size=3, chunk_table=table))
    for pictures in (1, 2, 4):
        succeeded(kept.bench.run(num_images_per_prompt=pictures, step_ms=20))
    orders = [kept.bench.order(num_inference_steps=20, step_ms=20) for _ in range(4)]
    orders.append(replace(kept.bench.order(num_images_per_prompt=2), alone=True, first_output=5))
    futures = [kept.host.submit(order, Recorder()) for order in orders]
    *shared, alone = [succeeded(future.result(RUN_TIMEOUT_S)) for future in futures]
    assert {outcome.facts.batch_size for outcome in shared} == {3}
    assert all(outcome.facts.batch_size_mean > 1 for outcome in shared)
    assert None not in {outcome.facts.batch_group_id for outcome in shared}
    assert alone.facts.batch_size == 1
    assert [(output.name, output.index) for output in alone.outputs] == [("5.png", 5), ("6.png", 6)]
    assert kept.host.capability().abilities["stub"].chunks[0].limit > 1
    kept.host.close()
    assert table.is_file()


def test_a_run_in_the_child_tells_every_event_in_order_and_leaves_its_files(make: Callable[..., Kept]) -> None:
    kept = make()
    order, recorder = kept.bench.order(num_inference_steps=5, preview_every_steps=2), Recorder()
    facts = succeeded(kept.bench.run(order, recorder)).facts
    assert recorder.stages == ["load", "encode_prompt", "denoise", "decode", "export"]
    assert recorder.progress == [(step, 5) for step in range(1, 6)]
    assert len(recorder.named(EventName.PREVIEW)) == 2
    assert [path.name for path in order.output_dir.iterdir()] == ["0.png"]
    assert facts.timings_ms.keys() == set(recorder.stages)
    assert kept.host.capability().loaded == ("stub",), "the record is fresh once a run has ended"
    assert kept.available == [True]


def test_orders_that_come_before_the_child_is_there_wait_for_it(make: Callable[..., Kept]) -> None:
    kept = make()
    futures = [kept.host.submit(kept.bench.order(), Recorder()) for _ in range(3)]
    doomed = kept.host.submit(kept.bench.order(job_id="doomed"), Recorder())
    assert kept.host.interrupt("doomed", InterruptReason.CANCEL)
    assert doomed.result(0) == RunInterrupted(InterruptReason.CANCEL)
    for future in futures:
        succeeded(future.result(START_TIMEOUT_S))


def test_a_cancel_lands_at_the_next_step_and_harms_no_other(make: Callable[..., Kept]) -> None:
    kept = make()
    recorder = Recorder()
    doomed = kept.host.submit(kept.bench.order(job_id="doomed", num_inference_steps=200, step_ms=20), recorder)
    other = kept.host.submit(kept.bench.order(num_inference_steps=20, step_ms=5), Recorder())
    eventually(lambda: recorder.progress, START_TIMEOUT_S)
    assert kept.host.interrupt("doomed", InterruptReason.CANCEL)
    assert doomed.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.CANCEL)
    assert len(recorder.progress) < 200
    succeeded(other.result(RUN_TIMEOUT_S))
    assert not kept.host.interrupt("doomed", InterruptReason.CANCEL), "it is over"


@pytest.mark.parametrize("crash", ["kill", "segv", "exit", "abort", "memory"])
def test_a_child_that_dies_loses_its_runs_at_once_and_another_takes_over(make: Callable[..., Kept], crash: str) -> None:
    kept = make()
    pid = kept.ready()
    neighbour = Recorder()
    futures = [
        kept.host.submit(kept.bench.order(num_inference_steps=200, step_ms=20), neighbour),
        kept.host.submit(kept.bench.order(crash_at_step=3, crash=crash, step_ms=20), Recorder()),
    ]
    for future in futures:
        outcome = future.result(RUN_TIMEOUT_S)
        assert isinstance(outcome, RunLost), outcome
    assert 0 < len(neighbour.progress) < 200
    succeeded(kept.bench.run())
    assert kept.replaced(pid) != pid
    assert kept.available == [True, False, True]
    if crash == "segv":
        assert any("Segmentation fault" in line for line in kept.lines), "where it crashed is told"


def test_a_call_that_holds_the_interpreter_for_ever_is_ended_by_force(make: Callable[..., Kept]) -> None:
    kept = make()
    pid, recorder = kept.ready(), Recorder()
    held = kept.host.submit(kept.bench.order(job_id="held", crash_at_step=4, step_ms=20, crash="hold-gil"), recorder)
    eventually(lambda: len(recorder.progress) == 3, RUN_TIMEOUT_S)
    kept.host.interrupt("held", InterruptReason.CANCEL)  # nobody there hears it, and nobody here waits
    assert not held.done()

    assert kept.host.end_by_force("the job's time is over")

    outcome = held.result(RUN_TIMEOUT_S)
    assert isinstance(outcome, RunLost)
    assert "the job's time is over" in outcome.detail
    succeeded(kept.bench.run())
    assert not psutil.pid_exists(pid)


def test_a_child_is_replaced_after_its_share_of_jobs_and_between_jobs_alone(make: Callable[..., Kept]) -> None:
    kept = make(recycling=Recycling(after_jobs=3))
    first = kept.ready()
    long = kept.host.submit(kept.bench.order(num_inference_steps=40, step_ms=10), Recorder())
    for _ in range(3):
        succeeded(kept.bench.run())
    late = kept.host.submit(kept.bench.order(), Recorder())  # waits for the next child
    succeeded(long.result(RUN_TIMEOUT_S))
    succeeded(late.result(START_TIMEOUT_S))
    second = kept.replaced(first)
    assert not psutil.pid_exists(first)
    succeeded(kept.bench.run())
    assert kept.host.pid == second


def test_a_child_is_replaced_above_its_memory_mark(make: Callable[..., Kept]) -> None:
    kept = make(recycling=Recycling(above_bytes=1))
    first = kept.ready()
    succeeded(kept.bench.run())
    assert kept.replaced(first) != first


@pytest.mark.parametrize(
    ("jobs", "memory_bytes", "due"),
    [(0, 10**12, True), (2, 0, False), (3, 0, True), (2, 1_000, False), (2, 1_001, True)],
)
def test_recycling_is_due_after_the_jobs_or_above_the_mark(jobs: int, memory_bytes: int, due: bool) -> None:
    assert Recycling(after_jobs=3, above_bytes=1_000).due(jobs, memory_bytes) is due
    assert not Recycling().due(jobs, memory_bytes)


def test_starts_that_fail_are_tried_ever_later() -> None:
    waits = [backoff_s(failures) for failures in range(12)]
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert waits[1] < 1 < waits[-1] == BACKOFF_MAX_S


def test_a_device_that_does_not_exist_is_told_once_and_not_tried_again(make: Callable[..., Kept]) -> None:
    kept = make(HostConfig("cuda", "cuda:7", (), {}, cache_size=1, concurrency=1))
    told = eventually(lambda: kept.unusable, START_TIMEOUT_S)
    assert "cuda:7" in told[0]
    assert not kept.host.health().ok
    assert kept.available == []


def test_a_child_that_cannot_start_is_tried_again_and_told_ever_louder(
    make: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workers.process_host.COMMAND", (sys.executable, "-c", "raise SystemExit('no device today')"))
    monkeypatch.setattr("workers.process_host.BACKOFF_FIRST_S", 0.01)
    kept = make()
    eventually(lambda: [record for record in caplog.records if record.levelname == "CRITICAL"], START_TIMEOUT_S)
    assert [record.levelname for record in caplog.records if "did not start" in record.message][:3] == [
        "ERROR",
        "ERROR",
        "CRITICAL",
    ]
    assert "no device today" in caplog.text
    waiting = kept.host.submit(kept.bench.order(), Recorder())
    kept.host.close(5.0)
    assert waiting.result(0) == RunInterrupted(InterruptReason.GIVE_BACK)


def test_closing_gives_running_jobs_back_and_leaves_no_process(make: Callable[..., Kept]) -> None:
    kept = make()
    pid, recorder = kept.ready(), Recorder()
    running = kept.host.submit(kept.bench.order(num_inference_steps=200, step_ms=20), recorder)
    eventually(lambda: recorder.progress, RUN_TIMEOUT_S)
    kept.host.close(5.0)
    assert running.result(0) == RunInterrupted(InterruptReason.GIVE_BACK)
    assert not psutil.pid_exists(pid)
    assert kept.bench.run() == RunInterrupted(InterruptReason.GIVE_BACK)


def test_a_child_that_hears_nothing_does_not_keep_the_host_from_closing(make: Callable[..., Kept]) -> None:
    kept = make()
    pid, recorder = kept.ready(), Recorder()
    held = kept.host.submit(kept.bench.order(crash_at_step=4, step_ms=20, crash="hold-gil"), recorder)
    eventually(lambda: len(recorder.progress) == 3, RUN_TIMEOUT_S)
    kept.host.close(0.2)
    assert held.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.GIVE_BACK)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("crash", ["none", "hold-gil"])
def test_the_child_ends_with_its_parent_however_that_ends(tmp_path: Path, crash: str) -> None:
    script = f"""
import os, sys, threading
from pathlib import Path
from tests.integration.test_process_host import Kept
from tests.support.hosts import Recorder
from tests.support.waiting import eventually
kept, recorder = Kept(Path(sys.argv[1])), Recorder()
wishes = {{"crash_at_step": 3, "crash": "{crash}"}} if "{crash}" != "none" else {{}}
kept.ready()
kept.host.submit(kept.bench.order(num_inference_steps=200, step_ms=50, **wishes), recorder)
eventually(lambda: len(recorder.progress) == 2, 20.0)
print(kept.host.pid, flush=True)
threading.Event().wait()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, RUN_TIMEOUT_S)


def test_what_runs_models_is_given_no_password(make: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIRT_REDIS_URL", "redis://:secret@host")
    given = psutil.Process(make().ready()).environ()
    assert "PATH" in given
    assert not [name for name in given if name.startswith("OMNIRT_")]


def test_a_watcher_that_raises_loses_its_own_run_alone(make: Callable[..., Kept]) -> None:
    kept = make()
    kept.ready()
    begun = threading.Event()

    def burst() -> None:
        begun.set()
        raise ValueError("the watcher's own fault")

    spoilt = kept.host.submit(
        kept.bench.order(num_inference_steps=50, step_ms=5), Recorder().on(EventName.STAGE_PROGRESS, burst)
    )
    other = kept.host.submit(kept.bench.order(num_inference_steps=10, step_ms=5), Recorder())
    assert isinstance(spoilt.result(RUN_TIMEOUT_S), RunLost | RunFailed)
    succeeded(other.result(RUN_TIMEOUT_S))
