"""One attempt of a job, on a store in memory and a device that does what the test says."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import (
    ArtifactKind,
    ErrorInfo,
    EventName,
    ExecutionMode,
    Inputs,
    JobState,
    ResolvedRequest,
    Task,
)
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.store import EventDraft, Lease, NewJob, Outcome, StoredJob
from omnirt_tasks.uploads import UploadStorage
from tests.support.waiting import eventually
from workers.attempts import AttemptRunner
from workers.host import (
    DeviceCapability,
    HostEvent,
    HostHealth,
    InterruptReason,
    OnEvent,
    OutputFile,
    RunFacts,
    RunFailed,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)

QUEUE = "cpu-stub-stub"


class ScriptedHost:
    """A DeviceHost whose runs end when the test says so, or at their interrupt unless it is `deaf`."""

    def __init__(self) -> None:
        self.orders: dict[str, RunOrder] = {}
        self.interrupts: list[tuple[str, InterruptReason]] = []
        self.tell: dict[str, OnEvent] = {}
        self.deaf = False
        self.can_be_forced = False
        self.forced: list[str] = []
        self.stuck_for_s: float | None = None
        self._futures: dict[str, Future[RunOutcome]] = {}

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        future: Future[RunOutcome] = Future()
        self.tell[order.job_id] = on_event
        self._futures[order.job_id] = future
        self.orders[order.job_id] = order
        return future

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        self.interrupts.append((job_id, reason))
        future = self._futures.get(job_id)
        if future is None or future.done():
            return False
        if not self.deaf:
            future.set_result(RunInterrupted(reason))
        return True

    def succeed(self, job_id: str, content: bytes = b"picture") -> None:
        (self.orders[job_id].output_dir / "0.png").write_bytes(content)
        output = OutputFile("0.png", 0, ArtifactKind.IMAGE, "image/png", seed=1)
        facts = RunFacts(ExecutionMode.LEGACY_CALL, {"denoise": 1.0}, (), {})
        self._futures[job_id].set_result(RunSucceeded((output,), facts))

    def end(self, job_id: str, outcome: RunOutcome) -> None:
        self._futures[job_id].set_result(outcome)

    def end_by_force(self, why: str) -> bool:
        """Lose every run, as the death of a device's process does."""
        if self.can_be_forced:
            self.forced.append(why)
            for future in self._futures.values():
                if not future.done():
                    future.set_result(RunLost(why))
        return self.can_be_forced

    def capability(self) -> DeviceCapability:
        return DeviceCapability("cpu-stub", "cpu-stub:0", "scripted", None, (), ("stub",), (), 8)

    def health(self) -> HostHealth:
        return HostHealth(ok=True, stuck_for_s=self.stuck_for_s)

    def close(self, timeout_s: float = 10.0) -> None:
        pass


class FlakyStore(MemoryJobStore):
    """A store that is away while `away` is set; `lose_answers` calls of commit work but their answers are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.lose_answers = 0
        self.appended: list[EventDraft] = []

    def append(self, lease: Lease, drafts: Sequence[EventDraft]) -> bool:
        self._check()
        self.appended.extend(drafts)
        return super().append(lease, drafts)

    def commit(self, lease: Lease, outcome: Outcome) -> bool:
        self._check()
        committed = super().commit(lease, outcome)
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("its answer was lost")
        return committed

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable("away")


class Bench:
    """A runner with its store, host and files; `begin` runs a job in a thread of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        job_timeout_s: float = 30.0,
        lease_ttl_s: float = 30.0,
        stop_patience_s: float | None = None,
    ) -> None:
        self.store = FlakyStore()
        self.host = ScriptedHost()
        self.folder = folder
        self.stuck: list[str] = []
        self.artifacts = ArtifactStorage((folder / "data").as_uri())
        self.uploads = UploadStorage((folder / "data").as_uri(), ttl_s=60, max_bytes=10**6, max_pixels=10**6)
        self.ended: dict[str, StoredJob | None] = {}
        self.runner = AttemptRunner(
            store=self.store,
            host=self.host,
            artifacts=self.artifacts,
            uploads=self.uploads,
            worker_id="w1",
            scratch_dir=folder / "scratch",
            lease_ttl_s=lease_ttl_s,
            job_timeout_s=job_timeout_s,
            preview_every_steps=0,
            on_stuck=self.stuck.append,
            abandon_after_s=0.2,
            stop_patience_s=stop_patience_s,
        )
        self._threads: list[threading.Thread] = []

    def queue(self, job_id: str = "job-1", **inputs: str) -> str:
        resolved = ResolvedRequest(
            task=Task.TEXT2IMAGE,
            model="stub",
            backend="cpu-stub",
            inputs=Inputs(prompt="x", **inputs),
            config={"seed": 1},
        )
        self.store.create(NewJob(id=job_id, owner="", queue=QUEUE, request={}, resolved=resolved))
        return job_id

    def begin(self, job_id: str) -> threading.Thread:
        def run() -> None:
            self.ended[job_id] = self.runner.run(job_id)

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()
        return thread

    def begun(self, job_id: str = "job-1", **inputs: str) -> str:
        """A job that the device has in hand."""
        self.begin(self.queue(job_id, **inputs))
        eventually(lambda: job_id in self.host.orders)
        return job_id

    def end(self, job_id: str = "job-1") -> StoredJob | None:
        """What `run` returned."""
        eventually(lambda: job_id in self.ended)
        return self.ended[job_id]

    def state(self, job_id: str = "job-1") -> JobState:
        return self.store.get(job_id).record.state

    def close(self) -> None:
        self.store.away = False
        self.host.deaf = False
        self.runner.close()
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**settings: float) -> Bench:
        benches.append(Bench(tmp_path / str(len(benches)), **settings))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def test_an_unknown_job_is_dropped(bench: Bench) -> None:
    assert bench.runner.run("unknown") is None


def test_a_job_in_hand_is_not_begun_twice(bench: Bench) -> None:
    job_id = bench.begun()

    assert bench.runner.run(job_id) is None

    bench.host.succeed(job_id)
    ended = bench.end()
    assert ended is not None
    assert (ended.record.state, ended.record.attempt) == (JobState.SUCCEEDED, 1)
    assert bench.runner.run(job_id) is None


def test_the_files_are_published_under_the_attempt_and_the_scratch_is_gone(bench: Bench) -> None:
    job_id = bench.begun()
    bench.host.succeed(job_id, b"picture")

    ended = bench.end()

    assert ended is not None
    assert ended.record.result is not None
    (output,) = ended.record.result.outputs
    assert output.path == output.url == f"/v1/jobs/{job_id}/artifacts/0.png"
    assert output.size_bytes == 7
    assert len(output.sha256) == 64
    assert bench.artifacts.stat(job_id, 1, "0.png") == 7
    assert list((bench.folder / "scratch").iterdir()) == []


def test_events_are_logged_in_the_order_in_which_they_were_told(bench: Bench) -> None:
    job_id = bench.begun()
    for step in range(1, 201):
        event = HostEvent(EventName.STAGE_PROGRESS, "denoise", {"step": step, "total": 200})
        bench.host.tell[job_id](event)
    bench.host.succeed(job_id)
    bench.end()

    log = bench.store.events(job_id)

    assert [event.data["step"] for event in log if event.event is EventName.STAGE_PROGRESS] == list(range(1, 201))
    assert log[-1].event is EventName.JOB_FINISHED


def test_while_the_store_is_away_nothing_blocks_and_what_matters_is_told_later(bench: Bench) -> None:
    job_id = bench.begun()
    bench.store.away = True
    tell = bench.host.tell[job_id]

    tell(HostEvent(EventName.STAGE_START, "denoise"))
    for step in range(1, 2001):
        tell(HostEvent(EventName.STAGE_PROGRESS, "denoise", {"step": step, "total": 2000}))
        tell(HostEvent(EventName.PREVIEW, "denoise", {"step": step}))
    tell(HostEvent(EventName.STAGE_END, "denoise", {"elapsed_ms": 1.0}))
    bench.host.succeed(job_id)
    bench.store.away = False
    bench.end()

    log = bench.store.events(job_id)
    names = [event.event for event in log]
    assert names[-1] is EventName.JOB_FINISHED
    assert names.count(EventName.STAGE_START) == names.count(EventName.STAGE_END) == 1
    assert names.count(EventName.PREVIEW) <= 2, "a newer preview takes the place of one that was not sent"
    steps = [event.data["step"] for event in log if event.event is EventName.STAGE_PROGRESS]
    assert steps == sorted(steps, key=lambda step: int(str(step)))
    assert steps[-1] == 2000, "the newest progress is kept"
    assert len(steps) <= 700


def test_a_cancel_before_the_device_has_the_job_is_not_lost(bench: Bench) -> None:
    job_id = bench.queue()
    submit = bench.host.submit

    def cancel_meanwhile(order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        bench.runner.cancel(job_id)  # the host does not know the job yet
        return submit(order, on_event)

    bench.host.submit = cancel_meanwhile  # type: ignore[method-assign]
    bench.begin(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.CANCELLED


def test_a_cancel_that_only_the_record_tells_of_is_seen_with_the_next_renewal(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(lease_ttl_s=0.3)
    job_id = bench.begun()

    bench.store.cancel(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.CANCELLED
    assert bench.host.interrupts == [(job_id, InterruptReason.CANCEL)]


def test_a_lease_is_held_as_long_as_the_job_runs(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(lease_ttl_s=0.3)
    job_id = bench.begun()
    begun_until = bench.store.get(job_id).lease_expires_at_ms
    assert begun_until is not None

    eventually(lambda: (bench.store.get(job_id).lease_expires_at_ms or 0) > begun_until + 500)

    assert list(bench.store.reconcile(unclaimed_after_ms=5_000).resend) == []
    bench.host.succeed(job_id)
    assert bench.state() or bench.end()


def test_who_lost_the_lease_stops_and_publishes_nothing(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(lease_ttl_s=0.3)
    job_id = bench.begun()
    bench.store.purge(job_id)

    assert bench.end() is None

    assert bench.host.interrupts == [(job_id, InterruptReason.LEASE_LOST)]
    assert not (bench.folder / "data" / "jobs" / job_id).exists()


def test_a_result_that_comes_after_the_lease_was_lost_is_removed(bench: Bench) -> None:
    job_id = bench.begun()
    bench.store.purge(job_id)

    bench.host.succeed(job_id)

    assert bench.end() is None
    assert not (bench.folder / "data" / "jobs" / job_id / "1").exists()


def test_a_commit_whose_answer_was_lost_is_no_reason_to_remove_the_result(bench: Bench) -> None:
    job_id = bench.begun()
    bench.store.lose_answers = 2

    bench.host.succeed(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.SUCCEEDED
    assert bench.artifacts.stat(job_id, 1, "0.png") == 7
    assert [event.event for event in bench.store.events(job_id)].count(EventName.JOB_FINISHED) == 1


def test_a_failed_run_fails_its_job_with_the_runs_own_error(bench: Bench) -> None:
    job_id = bench.begun()

    bench.host.end(job_id, RunFailed(ErrorInfo(code="out_of_memory", message="too large")))

    ended = bench.end()
    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "out_of_memory"


def test_an_input_that_is_gone_fails_the_job_before_the_device_hears_of_it(bench: Bench) -> None:
    job_id = bench.queue(image="upload:0123456789abcdef0123456789abcdef")

    ended = bench.runner.run(job_id)

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "upload_not_found"
    assert not bench.host.orders


def test_an_earlier_output_is_an_input(bench: Bench) -> None:
    first = bench.begun("first")
    bench.host.succeed(first, b"the first picture")
    bench.end(first)

    second = bench.begun("second", image=f"artifact:{first}/0.png")

    assert bench.host.orders[second].files["image"].read_bytes() == b"the first picture"
    bench.host.succeed(second)
    bench.end(second)


def test_a_fault_of_ours_fails_the_job_and_tells_nothing_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("/srv/secret/path")

    monkeypatch.setattr(bench.host, "submit", fail)

    ended = bench.runner.run(bench.queue())

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "internal"
    assert "/srv" not in str(ended.record.error)
    assert "/srv/secret/path" in caplog.text


def test_a_job_that_is_given_back_waits_for_its_next_attempt(bench: Bench) -> None:
    job_id = bench.begun()

    bench.runner.give_back_all()

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.QUEUED
    other = bench.queue("job-2")
    late = bench.runner.run(other)  # its message was taken just before
    assert late is not None
    assert late.record.state is JobState.QUEUED
    assert other not in bench.host.orders
    assert job_id in bench.host.orders


def test_a_run_past_its_limit_fails_with_timeout(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(job_timeout_s=0.1)
    bench.begun()

    ended = bench.end()

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "timeout"
    assert not bench.stuck


def test_a_run_that_does_not_stop_at_its_limit_is_settled_without_it_and_told(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(job_timeout_s=0.1)
    bench.host.deaf = True
    job_id = bench.begun()

    ended = bench.end()

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "timeout"
    assert len(bench.stuck) == 1
    assert job_id in bench.stuck[0]


def test_a_run_that_does_not_stop_is_given_back_without_it_when_the_worker_leaves(bench: Bench) -> None:
    bench.host.deaf = True
    bench.host.stuck_for_s = 60.0
    bench.begun()

    bench.runner.give_back_all()

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.QUEUED
    assert bench.stuck


def test_a_model_that_still_loads_when_the_worker_leaves_is_given_back_and_no_fault_of_the_device(bench: Bench) -> None:
    bench.host.deaf = True  # a loader takes no interrupts, and makes no device calls
    bench.begun()

    bench.runner.give_back_all()

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.QUEUED
    assert not bench.stuck


def test_a_host_that_can_be_forced_is_and_the_worker_goes_on(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(job_timeout_s=0.1)
    bench.host.deaf = bench.host.can_be_forced = True
    job_id = bench.begun()

    ended = bench.end()

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "timeout", "its own time was over"
    assert [job_id in why for why in bench.host.forced] == [True]
    assert not bench.stuck


def test_a_run_that_is_lost_goes_back_to_its_queue_at_once(bench: Bench) -> None:
    job_id = bench.begun()

    bench.host.end(job_id, RunLost("its process was killed"))

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.QUEUED
    (told,) = [event for event in bench.store.events(job_id) if event.event is EventName.JOB_REQUEUED]
    assert told.data == {"attempt": 1, "reason": "device_lost"}


@pytest.mark.parametrize(("stuck_for_s", "forced"), [(60.0, 1), (None, 0)])
def test_a_cancelled_run_ends_by_force_only_where_it_holds_the_device(
    make_bench: Callable[..., Bench], stuck_for_s: float | None, forced: int
) -> None:
    bench = make_bench(stop_patience_s=0.1)
    bench.host.deaf = bench.host.can_be_forced = True
    bench.host.stuck_for_s = stuck_for_s
    job_id = bench.begun()
    bench.store.cancel(job_id)

    bench.runner.cancel(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.CANCELLED
    assert len(bench.host.forced) == forced, "a model that loads harms nobody"
