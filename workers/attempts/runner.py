"""One attempt of a job, from claim to commit.

gate, claim ─► inputs to scratch ─► host.submit ─► outcome ─► files published ─► commit
│                events ─► flusher ─► store   │
│                     └─► gate: it waits      └─ back to its queue, or nothing when the lease is lost
└─ none: drop the message, or send it again
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Container, Iterator
from pathlib import Path

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import EventName, ExecutionMode
from omnirt_tasks.errors import OmnirtError, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Claim, EventDraft, Lease, Origin, StoredJob
from omnirt_tasks.observability.logs import bound
from omnirt_tasks.observability.metrics import DeviceMetrics
from omnirt_tasks.observability.tracing import Tracing
from omnirt_tasks.uploads import UploadStorage
from workers.attempts.checkpoint_keeper import CheckpointKeeper
from workers.attempts.claiming import Claiming
from workers.attempts.deaf_runs import DeafRuns
from workers.attempts.endings import Address, AttemptEnd, Endings, fault
from workers.attempts.event_flusher import EventBuffer, EventFlusher
from workers.attempts.gate import Gate
from workers.attempts.leases import LeaseKeeper
from workers.attempts.orders import Orders
from workers.attempts.patience import LEAVING_PATIENCE_S, Patience
from workers.attempts.retries import RetryPolicy
from workers.attempts.runs import Run, TimeLimit
from workers.context import WAITING
from workers.host import (
    DeviceHost,
    HostEvent,
    InterruptReason,
    RunInterrupted,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)

logger = logging.getLogger(__name__)

ABANDON_AFTER_S = 5.0


def gateway_address(job_id: str, _origin: Origin, name: str) -> tuple[str, str | None]:
    """Where the gateway serves an output."""
    url = f"/v1/jobs/{job_id}/artifacts/{name}"
    return url, url


class AttemptRunner:
    """Runs attempts on one device host; many at once, each in its caller's thread. Safe to share between threads.

    `scratch_dir` is this process's own. A run that lasts longer than `job_timeout_s`, or than its job's deadline
    allows, fails with `timeout`. One whose device call does not come back within `abandon_after_s` of an interrupt that
    ends its attempt (`stop_patience_s` of a cancel; None: not before its time is over) is settled without it, and the
    host is ended by force: the other runs are lost to it and run again. Where that cannot be done `on_stuck` is told,
    once for each: from then on the device cannot be trusted. A run that is cancelled or given back while its model
    loads, with the device free, is settled without it too, and no reason to trust the device less.

    A job that is to run alone has the device to itself, one of `models_holding` has it as a whole, beside others that
    run; some wait for memory. `on_crowded` is told while one has it so, or waits, from any thread: no further job could
    begin. One that came to wait behind it all the same goes back to its queue, if `serves_elsewhere` says that another
    worker could run it.

    An error that another attempt may not meet is tried again `retries_max` times, at first after `retry_backoff_s`, and
    elsewhere if it can be. Only jobs of `queues` are begun (None: of any).
    `address` tells where an output will be found, `execution_mode` how every model of the host is run, where that is
    known.
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
        queues: Collection[str] | None = None,
        models_holding: Container[str] = (),
        retries_max: int = 2,
        retry_backoff_s: float = 1.0,
        serves_elsewhere: Callable[[StoredJob], bool] = lambda _: False,
        on_crowded: Callable[[bool], object] = lambda _: None,
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
        self._worker_id = worker_id
        self._job_timeout_s = job_timeout_s
        self._models_holding = models_holding
        self._serves_elsewhere = serves_elsewhere
        self._tracing = tracing
        self._metrics = metrics
        self._abandon_after_s = abandon_after_s
        self._stop_patience_s = stop_patience_s
        self._leaving = threading.Event()
        self._changed = threading.Condition()  # guards the three below
        self._in_hand: set[str] = set()
        self._cancelled: set[str] = set()  # of those, whose cancel came before their run was known
        self._runs: dict[str, Run] = {}
        self._patiently = Patience(self._leaving)
        self._gate = Gate(on_crowded, self._wake_runs)
        self._claiming = Claiming(
            store=store,
            gate=self._gate,
            patiently=self._patiently,
            leaving=self._leaving,
            serves_elsewhere=serves_elsewhere,
            worker_id=worker_id,
            lease_ttl_s=lease_ttl_s,
            queues=queues,
            execution_mode=execution_mode,
        )
        self._deaf = DeafRuns(host, patience_s=abandon_after_s, on_stuck=on_stuck)
        self._checkpoints = CheckpointKeeper(store, artifacts)
        self._orders = Orders(
            store=store,
            artifacts=artifacts,
            uploads=uploads,
            checkpoints=self._checkpoints,
            patiently=self._patiently,
            scratch_dir=scratch_dir,
            preview_every_steps=preview_every_steps,
        )
        self._endings = Endings(
            store=store,
            artifacts=artifacts,
            patiently=self._patiently,
            policy=RetryPolicy(retries_max, retry_backoff_s),
            serves_elsewhere=serves_elsewhere,
            address=address,
            worker_id=worker_id,
        )
        self._keeper = LeaseKeeper(store, lease_ttl_s=lease_ttl_s, stop_run=self._stop)
        self._flusher = EventFlusher(store, on_lost=self._lose)
        self._keeper.start()
        self._flusher.start()

    @property
    def running(self) -> int:
        """How many attempts run; what waits at the gate does not."""
        return len(self._runs)

    def run(self, job_id: str, *, on_begun: Callable[[], None] = lambda: None) -> AttemptEnd | None:
        """Run the job's next attempt to its end, in this thread; `on_begun` is called once the device has it.

        None means that there is nothing to do: an unknown job, one that is over, or one that another attempt holds or
        another worker is to have. A job that ended before its message came, cancelled or too late, is an end too; so is
        one that a leaving worker did not begin. Raises StoreUnavailable when the store stays away before anything was
        begun.
        """
        with self._changed:
            if job_id in self._in_hand:
                return None
            self._in_hand.add(job_id)
        try:
            return self._run(job_id, on_begun)
        finally:
            with self._changed:
                self._in_hand.discard(job_id)
                self._cancelled.discard(job_id)
                self._changed.notify_all()

    def cancel(self, job_id: str) -> None:
        """Stop the job at its next device call, if it runs here; its cancel is already in its record."""
        with self._changed:
            run = self._runs.get(job_id)
            if run is None and job_id in self._in_hand:
                self._cancelled.add(job_id)
        if run is not None:
            self._stop(run, InterruptReason.CANCEL)

    def give_back_all(self) -> None:
        """Stop every run at its next device call, and put its job back into its queue. No new one begins."""
        self._leaving.set()
        self._gate.wake()
        with self._changed:
            runs = list(self._runs.values())
        for run in runs:
            self._stop(run, InterruptReason.GIVE_BACK)

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no job is in hand; false after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._in_hand, timeout_s)

    def close(self) -> None:
        """Give back what runs, wait for it, and stop the threads. Idempotent."""
        self.give_back_all()
        self.wait_idle(self._abandon_after_s + LEAVING_PATIENCE_S)
        self._deaf.close()
        self._keeper.close()
        self._flusher.close()

    def _run(self, job_id: str, on_begun: Callable[[], None]) -> AttemptEnd | None:
        run: Run | None = None
        place = self._gate.arrive()
        try:
            claim = self._claiming.claim(job_id, place)
            if not isinstance(claim, Claim):
                return self._endings.with_whole(self._claiming.not_begun(job_id, claim))
            run = Run(
                claim,
                place,
                limit=TimeLimit.of(claim, self._job_timeout_s),
                patience_s=self._abandon_after_s,
                stop_patience_s=self._stop_patience_s,
            )
            with self._hold(run), self._observed(run):
                return self._attempt(run, on_begun)
        finally:
            if run is None:
                self._gate.leave(place)
            else:  # one that was left on the device is still beside whoever comes
                run.once_off_device(lambda: self._gate.leave(place))

    def _attempt(self, run: Run, on_begun: Callable[[], None]) -> AttemptEnd | None:
        buffer = self._flusher.open(run.lease)
        try:
            try:
                with self._orders.folder(run.lease) as folder:
                    order = self._orders.make(run, folder)
                    outcome = self._work(run, order, buffer, on_begun)
                    return self._endings.end(run, outcome, order.output_dir, buffer)
            except StoreUnavailable:
                raise
            except OmnirtError as error:  # an input that is gone, a storage that is away
                logger.warning("Job %s cannot be begun: %s", run.lease.job_id, error, exc_info=error)
                return self._endings.fail(run, error.info(), buffer)
            except Exception as error:
                logger.exception("Job %s failed for a reason that lies with the worker.", run.lease.job_id)
                return self._endings.fail(run, fault(error), buffer)
        except StoreUnavailable as error:
            # Nobody was told how it ended: its lease lapses, and the job runs again.
            logger.error("The store was away for too long; job %s will run again: %s", run.lease.job_id, error)  # noqa: TRY400
            return None
        finally:
            buffer.discard()

    def _work(self, run: Run, order: RunOrder, buffer: EventBuffer, on_begun: Callable[[], None]) -> RunOutcome:
        if (reason := run.interrupted_by()) is not None:
            return RunInterrupted(reason)
        if run.job.resolved.model in self._models_holding:
            alone_in_that = self._gate.hold(run.place)
            if not alone_in_that and self._serves_elsewhere(run.job):
                return RunInterrupted(InterruptReason.NO_ROOM)

        def on_event(event: HostEvent) -> None:
            if event.stage == WAITING:
                self._note_waiting(run, begins=event.event is EventName.STAGE_START)
            if event.event is EventName.CHECKPOINT:
                self._checkpoints.hear(run, order, event)  # told to the job once it is kept
            else:
                buffer.put(EventDraft(event.event, event.stage, event.data))
                self._count(event, run.job.resolved.model)

        future = self._host.submit(order, on_event)
        run.begun(future)
        if (reason := run.interrupted_by()) is not None:  # it came while the host did not know the job yet
            self._host.interrupt(run.lease.job_id, reason)
        on_begun()
        while not future.done():
            if run.overdue:
                self._stop(run, InterruptReason.TIMEOUT)
            if run.abandoned:
                return self._deaf.abandon(run)
            if run.place.surplus and run.interrupted_by() is None and self._serves_elsewhere(run.job):
                self._stop(run, InterruptReason.NO_ROOM)
            if (made := run.take_checkpoint()) is not None:
                self._checkpoints.keep(run, made)
            else:
                run.wait()
        outcome = future.result()
        self._measure(run.job.resolved.model, outcome)
        return outcome

    # Small parts

    def _note_waiting(self, run: Run, *, begins: bool) -> None:
        if begins:
            self._gate.wait(run.place)
        else:
            self._gate.go_on(run.place)

    def _wake_runs(self) -> None:
        """Have each run look at its place; takes no lock, for whoever calls holds the gate's."""
        for run in list(self._runs.values()):
            run.wake()

    def _stop(self, run: Run, reason: InterruptReason) -> None:
        if run.interrupt(reason):
            self._host.interrupt(run.lease.job_id, reason)

    def _lose(self, lease: Lease) -> None:
        run = self._runs.get(lease.job_id)
        if run is not None and run.lease == lease:
            self._stop(run, InterruptReason.LEASE_LOST)

    @contextlib.contextmanager
    def _hold(self, run: Run) -> Iterator[None]:
        with self._changed:
            self._runs[run.lease.job_id] = run
            cancelled = run.lease.job_id in self._cancelled
        self._keeper.hold(run)
        if cancelled:
            self._stop(run, InterruptReason.CANCEL)
        if self._leaving.is_set():
            self._stop(run, InterruptReason.GIVE_BACK)
        try:
            yield
        finally:
            self._keeper.release(run)
            with self._changed:
                self._runs.pop(run.lease.job_id, None)

    @contextlib.contextmanager
    def _observed(self, run: Run) -> Iterator[None]:
        """Every log line of the attempt names its job, and a span of the job's trace tells how long it took."""
        lease, model = run.lease, run.job.resolved.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(bound(job_id=lease.job_id, model=model, worker=self._worker_id))
            if self._tracing is not None:
                attributes: dict[str, str | int] = {
                    "omnirt.job_id": run.job_id,
                    "omnirt.model": model,
                    "omnirt.attempt": lease.attempt,
                }
                if run.job.part is not None:
                    attributes["omnirt.part"] = run.job.part.number
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

    def _measure(self, model: str, outcome: RunOutcome) -> None:
        if self._metrics is None or not isinstance(outcome, RunSucceeded):
            return
        self._metrics.chunk_shared(model, outcome.facts)
        if outcome.facts.peak_memory_bytes is not None:
            self._metrics.memory_peak(self._host.capability().device, outcome.facts.peak_memory_bytes)
