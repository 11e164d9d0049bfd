"""A runner of attempts on a store in memory, with a device that does what the test says."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import (
    ArtifactKind,
    ErrorInfo,
    Event,
    EventName,
    ExecutionMode,
    Inputs,
    JobState,
    ResolvedRequest,
    Task,
)
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.values import Claim, EventDraft, Lease, MustRunAlone, NewJob, Outcome, StoredJob
from omnirt_tasks.splitting import split
from omnirt_tasks.uploads import UploadStorage
from tests.support.files import files_in
from tests.support.waiting import eventually
from workers.attempts import AttemptRunner
from workers.attempts.endings import AttemptEnd
from workers.host import (
    DeviceCapability,
    HostHealth,
    InterruptReason,
    OnEvent,
    OutputFile,
    RunFacts,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)

QUEUE = "cpu-stub-stub"

T = TypeVar("T")


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
        order = self.orders[job_id]
        name = f"{order.first_output}.png"
        (order.output_dir / name).write_bytes(content)
        output = OutputFile(name, order.first_output, ArtifactKind.IMAGE, "image/png", seed=1)
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
    """A store that is away while `away` is set; `lose_answers` of claims, appends and commits are lost.

    Its clock runs with ours, `ahead_ms` before it.
    """

    def __init__(self) -> None:
        super().__init__(now_ms=lambda: unix_ms() + self.ahead_ms)
        self.ahead_ms = 0
        self.away = False
        self.lose_answers = 0
        self.appended: list[EventDraft] = []

    def claim(self, job_id: str, **claim: Any) -> Claim | MustRunAlone | None:
        self._check()
        return self._answered(super().claim(job_id, **claim))

    def append(self, lease: Lease, drafts: Sequence[EventDraft], *, call: str | None = None) -> bool:
        self._check()
        self.appended.extend(drafts)
        return self._answered(super().append(lease, drafts, call=call))

    def commit(self, lease: Lease, outcome: Outcome) -> bool:
        self._check()
        return self._answered(super().commit(lease, outcome))

    def _answered(self, answer: T) -> T:
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("its answer was lost")
        return answer

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable("away")


class Bench:
    """A runner with its store, host and files; `begin` runs a job in a thread of its own.

    Another worker of the same jobs is a bench `beside` the first. `runner` has what AttemptRunner takes besides.
    """

    def __init__(self, folder: Path, *, worker_id: str = "w1", beside: "Bench | None" = None, **runner: Any) -> None:
        self.store: FlakyStore = FlakyStore() if beside is None else beside.store
        self.host = ScriptedHost()
        self.folder = folder
        self.stuck: list[str] = []
        self.crowded = False
        data = folder / "data" if beside is None else beside.folder / "data"
        self.artifacts = ArtifactStorage(data.as_uri())
        self.uploads = UploadStorage(data.as_uri(), ttl_s=60, max_bytes=10**6, max_pixels=10**6)
        self.ended: dict[str, AttemptEnd | None] = {}
        settings: dict[str, Any] = {
            "lease_ttl_s": 30.0,
            "job_timeout_s": 30.0,
            "preview_every_steps": 0,
            "on_stuck": self.stuck.append,
            "on_crowded": self._note_crowded,
            "abandon_after_s": 0.2,
        }
        self.runner = AttemptRunner(
            store=self.store,
            host=self.host,
            artifacts=self.artifacts,
            uploads=self.uploads,
            worker_id=worker_id,
            scratch_dir=folder / "scratch",
            **settings | runner,
        )
        self._threads: list[threading.Thread] = []

    def queue(self, job_id: str = "job-1", *, deadline_s: float | None = None, **inputs: str) -> str:
        resolved = ResolvedRequest(
            task=Task.TEXT2IMAGE,
            model="stub",
            backend="cpu-stub",
            inputs=Inputs(prompt="x", **inputs),
            config={"seed": 1},
            deadline_s=deadline_s,
        )
        self.store.create(NewJob(id=job_id, owner="", queue=QUEUE, request={}, resolved=resolved))
        return job_id

    def queue_split(self, job_id: str = "job-1", *, pictures: int = 2) -> list[str]:
        """A new job of so many pictures, each a part of its own; the ids of the parts."""
        resolved = ResolvedRequest(
            task=Task.TEXT2IMAGE,
            model="stub",
            backend="cpu-stub",
            inputs=Inputs(prompt="x"),
            config={"seed": 1, "num_images_per_prompt": pictures},
        )
        parts = split(resolved, pictures_per_part=1)
        job = self.store.create(NewJob(id=job_id, owner="", queue=QUEUE, request={}, resolved=resolved, parts=parts))
        return list(job.parts)

    def begin(self, job_id: str) -> threading.Thread:
        self.ended.pop(job_id, None)

        def run() -> None:
            self.ended[job_id] = self.runner.run(job_id)

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()
        return thread

    def in_line(self, job_id: str) -> None:
        """Begin the job, and return once it has its turn at the gate: whatever begins later comes after it."""
        before = self.runner._gate._arrived
        self.begin(job_id)
        eventually(lambda: self.runner._gate._arrived > before)

    def begun(self, job_id: str = "job-1", **request: Any) -> str:
        """A new job that the device has in hand."""
        self.begin(self.queue(job_id, **request))
        eventually(lambda: job_id in self.host.orders)
        return job_id

    def again(self, job_id: str = "job-1") -> str:
        """A queued job that the device has in hand, at its next attempt."""
        attempt = self.store.get(job_id).record.attempt + 1
        self.begin(job_id)
        eventually(lambda: self.orders(job_id, attempt))
        return job_id

    def let_the_lease_lapse(self) -> None:
        """Pass the lease's time, and have it taken away."""
        self.store.ahead_ms += 60_000
        assert self.store.reconcile(unclaimed_after_ms=600_000).expired

    def orders(self, job_id: str, attempt: int) -> bool:
        """Whether the device has been given this attempt."""
        return job_id in self.host.orders and self.host.orders[job_id].attempt == attempt

    def end(self, job_id: str = "job-1") -> StoredJob | None:
        """The job as its attempt left it."""
        ended = self.end_told(job_id)
        return None if ended is None else ended.job

    def end_told(self, job_id: str = "job-1") -> AttemptEnd | None:
        """What `run` returned."""
        eventually(lambda: job_id in self.ended)
        return self.ended[job_id]

    def error(self, job_id: str = "job-1") -> ErrorInfo:
        """What a job that has failed tells."""
        ended = self.end(job_id)
        assert ended is not None
        assert ended.record.error is not None, ended.record
        return ended.record.error

    def _note_crowded(self, crowded: bool) -> None:
        self.crowded = crowded

    def state(self, job_id: str = "job-1") -> JobState:
        return self.store.get(job_id).record.state

    def reasons(self, job_id: str = "job-1") -> list[object]:
        """Why the job went back to its queue, each time."""
        return [event.data["reason"] for event in self.events(EventName.JOB_REQUEUED, job_id)]

    def events(self, name: EventName, job_id: str = "job-1") -> list[Event]:
        return [event for event in self.store.events(job_id) if event.event is name]

    def stored(self, job_id: str = "job-1") -> list[str]:
        """The files of the job in the storage, relative to its folder."""
        folder = Path(str(self.artifacts.local_path(job_id, 1, "x"))).parent.parent
        return [str(file.relative_to(folder)) for file in files_in(folder)]

    def close(self) -> None:
        self.store.away = False
        self.host.deaf = False
        self.runner.close()
        for thread in self._threads:
            thread.join(10)
