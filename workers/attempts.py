"""One attempt of a job, from claim to commit.

    claim ─► inputs to scratch ─► host.submit ─► outcome ─► files published ─► commit
      │            events ─► flusher ─► store      │
      └─ None: drop the message                    └─ give back, or nothing when the lease is lost

Used by the Celery task and, on a store in memory, by OmniEngine. It has not heard of Celery.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import MEDIA_INPUTS, ErrorInfo, EventName, ExecutionMode, JobState
from omnirt_tasks.errors import (
    ArtifactNotFound,
    Internal,
    JobNotFound,
    JobTimeout,
    OmnirtError,
    StoreUnavailable,
)
from omnirt_tasks.jobs.store import (
    Cancelled,
    Claim,
    EventDraft,
    Failed,
    JobStore,
    Lease,
    Outcome,
    StoredJob,
    Succeeded,
)
from omnirt_tasks.observability.logs import bound
from omnirt_tasks.observability.metrics import DeviceMetrics
from omnirt_tasks.observability.tracing import Tracing
from omnirt_tasks.uploads import UploadStorage
from workers.event_flusher import EventBuffer, EventFlusher
from workers.host import (
    DeviceHost,
    HostEvent,
    InterruptReason,
    RunFailed,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)
from workers.leases import LeaseKeeper
from workers.report import describe_outputs, make_result
from workers.runs import Run

logger = logging.getLogger(__name__)

GIVE_BACK_REASON = "worker_leaving"
DEVICE_LOST_REASON = "device_lost"
ABANDON_AFTER_S = 5.0
STORE_PATIENCE_S = 300.0
LEAVING_PATIENCE_S = 10.0
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
DRAIN_TRY_S = 5.0

T = TypeVar("T")

# The path and the URL of an output, by its job and name.
Address = Callable[[Lease, str], tuple[str, str | None]]


def gateway_address(lease: Lease, name: str) -> tuple[str, str | None]:
    """Where the gateway serves an output."""
    url = f"/v1/jobs/{lease.job_id}/artifacts/{name}"
    return url, url


class AttemptRunner:
    """Runs attempts on one device host; many at once, each in its caller's thread. Safe to share between threads.

    `scratch_dir` is this process's own. A run that lasts longer than `job_timeout_s` fails with `timeout`. One whose
    device call does not come back within `abandon_after_s` of an interrupt that ends its attempt (`stop_patience_s` of
    a cancel; None: not before its time is over) is settled without it, and the host is ended by force: the other runs
    are lost to it and run again. Where that cannot be done `on_stuck` is told, once for each: from then on the device
    cannot be trusted. A run that is cancelled or given back while its model loads, with the device free, is settled
    without it too, and no reason to trust the device less. `address` tells where an output will be found,
    `execution_mode` how every model of the host is run, where that is known.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        host: DeviceHost,
        artifacts: ArtifactStorage,
        uploads: UploadStorage,
        worker_id: str,
        scratch_dir: Path,
        lease_ttl_s: float,
        job_timeout_s: float,
        preview_every_steps: int,
        on_stuck: Callable[[str], None] = logger.critical,
        address: Address = gateway_address,
        execution_mode: ExecutionMode | None = None,
        tracing: Tracing | None = None,
        metrics: DeviceMetrics | None = None,
        abandon_after_s: float = ABANDON_AFTER_S,
        stop_patience_s: float | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._artifacts = artifacts
        self._uploads = uploads
        self._worker_id = worker_id
        self._scratch_dir = scratch_dir
        self._lease_ttl_ms = round(lease_ttl_s * 1000)
        self._job_timeout_s = job_timeout_s
        self._preview_every_steps = preview_every_steps
        self._on_stuck = on_stuck
        self._address = address
        self._execution_mode = execution_mode
        self._tracing = tracing
        self._metrics = metrics
        self._abandon_after_s = abandon_after_s
        self._stop_patience_s = stop_patience_s
        self._runs: dict[str, Run] = {}
        self._changed = threading.Condition()
        self._leaving = threading.Event()
        self._left: list[threading.Timer] = []  # one for each run that was left, until it ends or its time is over
        self._keeper = LeaseKeeper(store, lease_ttl_s=lease_ttl_s, stop_run=self._stop)
        self._flusher = EventFlusher(store, on_lost=self._lose)
        scratch_dir.mkdir(parents=True, exist_ok=True)
        self._keeper.start()
        self._flusher.start()

    @property
    def running(self) -> int:
        """How many attempts are in hand."""
        return len(self._runs)

    def run(self, job_id: str, *, on_begun: Callable[[], None] = lambda: None) -> StoredJob | None:
        """Run the job's next attempt to its end, in this thread; `on_begun` is called once the device has it.

        Returns the job as it then stands: over, running elsewhere under a newer lease, or queued, and then the caller
        sends its message again; also a job that was cancelled before its message came. None means that there is nothing
        to do: an unknown job, one that is over, or one that another attempt holds. Raises StoreUnavailable when the
        store stays away before anything was begun.
        """
        if self._leaving.is_set():
            return self._found(job_id, JobState.QUEUED)
        with self._changed:
            if job_id in self._runs:
                return None
        claim = self._patiently(lambda: self._claim(job_id), "claimed")
        if claim is None:
            return self._found(job_id, JobState.CANCELLED)
        run = Run(
            claim.lease,
            claim.job,
            timeout_s=self._job_timeout_s,
            patience_s=self._abandon_after_s,
            stop_patience_s=self._stop_patience_s,
        )
        with self._hold(run), self._observed(run):
            return self._attempt(run, on_begun)

    def cancel(self, job_id: str) -> None:
        """Stop the job at its next device call, if it runs here; its cancel is already in its record."""
        run = self._runs.get(job_id)
        if run is not None:
            self._stop(run, InterruptReason.CANCEL)

    def give_back_all(self) -> None:
        """Stop every run at its next device call, and put its job back into its queue. No new one begins."""
        self._leaving.set()
        with self._changed:
            runs = list(self._runs.values())
        for run in runs:
            self._stop(run, InterruptReason.GIVE_BACK)

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no attempt is in hand; false after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._runs, timeout_s)

    def close(self) -> None:
        """Give back what runs, wait for it, and stop the threads. Idempotent."""
        self.give_back_all()
        self.wait_idle(self._abandon_after_s + LEAVING_PATIENCE_S)
        for last in self._left:
            last.cancel()
        self._keeper.close()
        self._flusher.close()

    # One attempt

    def _claim(self, job_id: str) -> Claim | None:
        return self._store.claim(
            job_id,
            worker_id=self._worker_id,
            lease_ttl_ms=self._lease_ttl_ms,
            execution_mode=self._execution_mode,
        )

    def _attempt(self, run: Run, on_begun: Callable[[], None]) -> StoredJob | None:
        buffer = self._flusher.open(run.lease)
        try:
            try:
                with self._scratch(run.lease) as folder:
                    outcome = self._work(run, folder, buffer, on_begun)
                    return self._end(run, outcome, folder, buffer)
            except StoreUnavailable:
                raise
            except Exception:
                logger.exception("Job %s failed for a reason that lies with the worker.", run.lease.job_id)
                return self._settle(run, buffer, lambda: Failed(_fault()))
        except StoreUnavailable as error:
            # Nobody was told how it ended: its lease lapses, and the job runs again.
            logger.error("The store was away for too long; job %s will run again: %s", run.lease.job_id, error)  # noqa: TRY400
            return None
        finally:
            buffer.discard()

    def _work(self, run: Run, folder: Path, buffer: EventBuffer, on_begun: Callable[[], None]) -> RunOutcome:
        try:
            order = self._order(run, folder)
        except OmnirtError as error:  # an input that is gone, a storage that is away
            return RunFailed(error.info())
        if (reason := run.interrupted_by()) is not None:
            return RunInterrupted(reason)

        def on_event(event: HostEvent) -> None:
            buffer.put(EventDraft(event.event, event.stage, event.data))
            self._count(event, run.job.resolved.model)

        future = self._host.submit(order, on_event)
        future.add_done_callback(run.wake)
        if (reason := run.interrupted_by()) is not None:  # it came while the host did not know the job yet
            self._host.interrupt(run.lease.job_id, reason)
        on_begun()
        while not future.done():
            if run.overdue:
                self._stop(run, InterruptReason.TIMEOUT)
            if run.abandoned:
                return self._abandon(run, future)
            run.wait()
        return future.result()

    def _order(self, run: Run, folder: Path) -> RunOrder:
        outputs, inputs = folder / "outputs", folder / "inputs"
        outputs.mkdir()
        inputs.mkdir()
        given = {name: getattr(run.job.resolved.inputs, name) for name in MEDIA_INPUTS}
        files: dict[str, Path] = {}
        for name, reference in given.items():
            if reference is not None:
                files[name] = inputs / name
                self._fetch(reference, files[name])
        return RunOrder(
            job_id=run.lease.job_id,
            attempt=run.lease.attempt,
            request=run.job.resolved,
            output_dir=outputs,
            files=files,
            preview_every_steps=self._preview_every_steps,
        )

    def _fetch(self, reference: str, target: Path) -> None:
        kind, _, rest = reference.partition(":")
        if kind == "upload":
            self._uploads.fetch(rest, target)
            return
        job_id, _, name = rest.partition("/")
        try:
            source = self._patiently(lambda: self._store.get(job_id), "read")
        except JobNotFound:
            raise ArtifactNotFound(f"The job of the artifact {name!r} is gone.") from None
        self._artifacts.fetch(job_id, source.record.attempt, name, target)

    def _abandon(self, run: Run, future: "Future[RunOutcome]") -> RunOutcome:
        reason = run.interrupted_by() or InterruptReason.TIMEOUT
        stuck_for_s = self._host.health().stuck_for_s or 0.0
        told = f"Job {run.lease.job_id} did not stop ({reason})."
        wanted_no_more = reason in {InterruptReason.GIVE_BACK, InterruptReason.CANCEL}
        if wanted_no_more and stuck_for_s < self._abandon_after_s / 2:
            # Its thread is busy outside the device, most likely with the loading of a model.
            logger.warning("Job %s is left (%s) while its run goes on; the device is free.", run.lease.job_id, reason)
            if reason is InterruptReason.CANCEL:
                self._end_in_time(run, future, told)
        elif not self._host.end_by_force(told):
            self._on_stuck(f"{told} The device call in hand has lasted {stuck_for_s:.0f} s.")
        # A cancelled run that never came back has in truth outlived its limit, but its caller gets what he asked for.
        return RunInterrupted(reason)

    def _end_in_time(self, run: Run, future: "Future[RunOutcome]", told: str) -> None:
        """A run that is left keeps its thread and its model: not for longer than any run may."""
        last = threading.Timer(run.left_s, lambda: future.done() or self._host.end_by_force(told))
        last.name, last.daemon = f"left-{run.lease.job_id[:8]}", True
        last.start()
        with self._changed:
            self._left = [timer for timer in self._left if timer.is_alive()] + [last]
        future.add_done_callback(lambda _: last.cancel())

    # How it ends

    def _end(self, run: Run, outcome: RunOutcome, folder: Path, buffer: EventBuffer) -> StoredJob | None:
        match outcome:
            case RunSucceeded():
                return self._succeed(run, outcome, folder / "outputs", buffer)
            case RunFailed(error):
                return self._settle(run, buffer, lambda: Failed(error))
            case RunLost(detail):
                logger.warning("Job %s goes back to its queue: %s", run.lease.job_id, detail)
                return self._give_back(run, buffer, DEVICE_LOST_REASON)
            case RunInterrupted(InterruptReason.LEASE_LOST):
                return self._now(run)  # another attempt has the job: nothing of this one counts
            case RunInterrupted(InterruptReason.GIVE_BACK):
                return self._give_back(run, buffer, GIVE_BACK_REASON)
            case RunInterrupted(InterruptReason.TIMEOUT):
                message = f"The job ran longer than the limit of {self._job_timeout_s:g} s."
                return self._settle(run, buffer, lambda: Failed(JobTimeout(message, "Ask for less work.").info()))
            case RunInterrupted():
                return self._settle(run, buffer, Cancelled)

    def _succeed(self, run: Run, done: RunSucceeded, outputs: Path, buffer: EventBuffer) -> StoredJob | None:
        lease = run.lease
        if self._metrics is not None and done.facts.peak_memory_bytes is not None:
            self._metrics.memory_peak(self._host.capability().device, done.facts.peak_memory_bytes)
        try:
            artifacts = describe_outputs(done.outputs, outputs, lambda name: self._address(lease, name))
            self._artifacts.publish(lease.job_id, lease.attempt, [outputs / output.name for output in done.outputs])
        except OmnirtError as error:
            failure = Failed(error.info())
            return self._settle(run, buffer, lambda: failure)

        def outcome() -> Outcome:
            log = self._store.events(lease.job_id, after=run.job.last_seq)
            return Succeeded(make_result(lease, run.job, done.facts, artifacts, log, self._worker_id))

        job = self._settle(run, buffer, outcome)
        if job is None or job.record.state is not JobState.SUCCEEDED or job.record.attempt != lease.attempt:
            self._remove_files(lease)
        return job

    def _settle(self, run: Run, buffer: EventBuffer, outcome: Callable[[], Outcome]) -> StoredJob | None:
        """Commit, once what the run told is in the log; the job as it stands then, None if it was purged.

        A refusal is no error: the job may have been committed by a try whose answer was lost, or belong to another
        attempt by now. The record tells.
        """

        def commit() -> StoredJob | None:
            if not buffer.drain(DRAIN_TRY_S):
                raise StoreUnavailable("The events of the job cannot be written.")
            with contextlib.suppress(JobNotFound):
                self._store.commit(run.lease, outcome())
                return self._store.get(run.lease.job_id)
            return None

        return self._patiently(commit, "committed")

    def _give_back(self, run: Run, buffer: EventBuffer, reason: str) -> StoredJob | None:
        def give_back() -> StoredJob | None:
            buffer.drain(DRAIN_TRY_S)
            with contextlib.suppress(JobNotFound):
                self._store.give_back(run.lease, reason=reason)
                return self._store.get(run.lease.job_id)
            return None

        return self._patiently(give_back, "given back")

    # Small parts

    def _stop(self, run: Run, reason: InterruptReason) -> None:
        if run.interrupt(reason):
            self._host.interrupt(run.lease.job_id, reason)

    def _lose(self, lease: Lease) -> None:
        run = self._runs.get(lease.job_id)
        if run is not None and run.lease == lease:
            self._stop(run, InterruptReason.LEASE_LOST)

    def _now(self, run: Run) -> StoredJob | None:
        try:
            return self._store.get(run.lease.job_id)
        except JobNotFound:
            return None

    def _found(self, job_id: str, state: JobState) -> StoredJob | None:
        try:
            job = self._patiently(lambda: self._store.get(job_id), "read")
        except JobNotFound:
            return None
        return job if job.record.state is state else None

    def _patiently(self, call: Callable[[], T], what: str) -> T:
        """The call's value, tried again while the store is away. Raises StoreUnavailable past all patience."""
        started_s, backoff_s = time.monotonic(), BACKOFF_FIRST_S
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                patience_s = LEAVING_PATIENCE_S if self._leaving.is_set() else STORE_PATIENCE_S
                if time.monotonic() - started_s > patience_s:
                    raise
                if backoff_s == BACKOFF_FIRST_S:
                    logger.warning("A job cannot be %s while the store is away: %s", what, error)
                time.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    @contextlib.contextmanager
    def _hold(self, run: Run) -> Iterator[None]:
        with self._changed:
            self._runs[run.lease.job_id] = run
        self._keeper.hold(run)
        if self._leaving.is_set():
            self._stop(run, InterruptReason.GIVE_BACK)
        try:
            yield
        finally:
            self._keeper.release(run)
            with self._changed:
                self._runs.pop(run.lease.job_id, None)
                self._changed.notify_all()

    @contextlib.contextmanager
    def _observed(self, run: Run) -> Iterator[None]:
        """Every log line of the attempt names its job, and a span of the job's trace tells how long it took."""
        lease, model = run.lease, run.job.resolved.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(bound(job_id=lease.job_id, model=model, worker=self._worker_id))
            if self._tracing is not None:
                attributes: dict[str, str | int] = {
                    "omnirt.job_id": lease.job_id,
                    "omnirt.model": model,
                    "omnirt.attempt": lease.attempt,
                }
                span = self._tracing.span("omnirt.attempt", traceparent=run.job.traceparent, attributes=attributes)
                stack.enter_context(span)
            yield

    def _count(self, event: HostEvent, model: str) -> None:
        if self._metrics is None:
            return
        if event.event is EventName.STAGE_END and isinstance(elapsed_ms := event.data.get("elapsed_ms"), int | float):
            self._metrics.stage_ended(event.stage, model, elapsed_ms / 1000)
        elif event.event is EventName.CACHE_HIT:
            self._metrics.cache_hit(str(event.data.get("cache")))

    @contextlib.contextmanager
    def _scratch(self, lease: Lease) -> Iterator[Path]:
        folder = self._scratch_dir / f"{lease.job_id}.{lease.attempt}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # a run that was abandoned may still write here

    def _remove_files(self, lease: Lease) -> None:
        try:
            self._artifacts.remove_attempt(lease.job_id, lease.attempt)
        except OmnirtError as error:
            logger.warning("Files of job %s, attempt %d, stay behind: %s", lease.job_id, lease.attempt, error)


def _fault() -> ErrorInfo:
    return Internal(
        "The job failed for a reason that lies with the server.", "Try again; the log has the reason."
    ).info()
