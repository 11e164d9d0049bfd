"""Everything that one worker process runs beside Celery, in the order in which it starts and ends.

device host ─ attempts ─ cancel notices ─ reconciler ─ heartbeat ─ canary

The device host is a child process for every real backend, so that this process holds no torch.
"""

import faulthandler
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from prometheus_client import CollectorRegistry

from omnirt_tasks.broker_lists import list_of, move_to_front
from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import Backend, WorkerCapability
from omnirt_tasks.errors import ConfigurationError, StoreUnavailable
from omnirt_tasks.jobs.fleet import Fleet
from omnirt_tasks.jobs.subscription import EventFeed
from omnirt_tasks.jobs.values import StoredJob, WakeUp
from omnirt_tasks.observability import tracing
from omnirt_tasks.observability.metrics import DeviceMetrics, MetricsServer
from omnirt_tasks.settings import Placement, Settings
from omnirt_tasks.stores import open_stores
from omnirt_tasks.tasks import CELERY_PRIORITIES
from workers.attempts import AttemptRunner
from workers.backends.cpu import host_memory_bytes
from workers.canary import Canary, heads_in_broker
from workers.chunks.limits_file import table_path
from workers.consumption import Consumption
from workers.devices import SHARED_BACKENDS, DeviceLock
from workers.heartbeat import Heartbeat
from workers.host import DeviceHost, HostConfig
from workers.loading import HOLDS_THE_DEVICE
from workers.plan import Plan
from workers.process_host import ProcessHost, Recycling
from workers.thread_host import BUDGET_SHARE, ThreadHost

logger = logging.getLogger(__name__)

SERVICE = "omnirt-worker"
SCRATCH_FOLDER = "scratch"
LAST_WORDS_S = 15.0
CLOSE_TIMEOUT_S = 5.0
LISTEN_AGAIN_S = 0.5
EXIT_STUCK = 70
EXIT_UNUSABLE = 1


class Serving:
    """A worker at work on its device, from construction to `close`.

    `queues` are those that it takes messages from. `resend` puts a job's message on its queue. `consumption` is told
    how many messages to hold: as many as `concurrency` while jobs can begin (one, if all its models hold the device as
    a whole), none while the device is away, one job has it, or one waits for it or for memory. It is ended when the
    worker can serve no more: by the fault of the device or of the consumption itself (EXIT_STUCK), or of the
    configuration (EXIT_UNUSABLE).
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        device: DeviceLock,
        *,
        queues: Sequence[str],
        worker_id: str,
        concurrency: int,
        resend: Callable[[WakeUp], None],
        consumption: Consumption,
    ) -> None:
        self._settings = settings
        self._queues = tuple(queues)
        self._worker_id = worker_id
        holding = {spec.id for spec in plan.models if spec.execution_mode in HOLDS_THE_DEVICE}
        if len(holding) == len(plan.models):
            concurrency = 1  # a second one could not begin
        self._concurrency = concurrency
        self._consumption = consumption
        self._stuck = threading.Lock()  # taken once, and never let go
        self._admitting = threading.Lock()  # guards the order of what consumption is told
        self._announcing = threading.Lock()
        self._announced = self._available = self._crowded = self._leaving = False
        self._grace: threading.Timer | None = None
        self._leave_by_s = 0.0
        self._started_at_ms = unix_ms()
        with ExitStack() as undo:
            stores = open_stores(settings)
            undo.callback(stores.close)
            self._broker = stores.broker
            tracer = tracing.start(settings, service=SERVICE)
            undo.callback(tracer.close)
            registry = CollectorRegistry()
            if settings.metrics_port is not None:
                undo.callback(MetricsServer(registry, host=settings.metrics_host, port=settings.metrics_port).close)
            self._metrics = DeviceMetrics(registry)
            config = host_config(settings, plan, device.device, concurrency)
            apart = placement_of(settings, plan.backend) is Placement.PROCESS
            self._host: DeviceHost = self._child(config) if apart else _thread_host(config)
            undo.callback(self._host.close, CLOSE_TIMEOUT_S)
            # This device's own: what a predecessor left there is nobody's.
            scratch_dir = settings.run_dir / SCRATCH_FOLDER / device.device.replace(":", "-")
            shutil.rmtree(scratch_dir, ignore_errors=True)
            self.runner = AttemptRunner(
                store=stores.jobs,
                host=self._host,
                artifacts=stores.artifacts,
                uploads=stores.uploads,
                worker_id=worker_id,
                scratch_dir=scratch_dir,
                lease_ttl_s=settings.lease_ttl_s,
                job_timeout_s=settings.job_timeout_s,
                preview_every_steps=settings.preview_every_steps,
                on_stuck=self._stick,
                stop_patience_s=settings.stop_patience_s if apart else None,
                execution_mode=plan.execution_mode,
                tracing=tracer,
                metrics=self._metrics,
                on_crowded=self._set_crowded,
                serves_elsewhere=lambda job: _served_beside(stores.fleet, worker_id, job),
                queues=self._queues,
                models_holding=holding,
                retries_max=settings.retries_max,
                retry_backoff_s=settings.retry_backoff_s,
            )
            undo.callback(self.runner.close)
            undo.callback(stores.feed.close)  # before the runner, which its cancels reach
            self._hear_cancels(stores.feed, undo)
            reconciler = stores.reconciler(resend)
            undo.callback(reconciler.close)
            reconciler.start()
            self._heartbeat = Heartbeat(stores.fleet, self._capability, every_s=settings.heartbeat_s)
            undo.callback(self._heartbeat.close)
            self._canary = Canary(
                consumption,
                heads_in_broker(self._broker, prefix=broker_prefix(settings)),
                stall_after_s=settings.stall_after_s,
                on_lost=self._lose_consumption,
            )
            undo.callback(self._canary.close)
            self._undo = undo.pop_all()
        if not apart:
            self._set_available(True)

    @property
    def leaving(self) -> bool:
        """Whether it was asked to leave."""
        return self._leaving

    @property
    def started_at_ms(self) -> int:
        """When it began, Unix ms; with the worker's id it names this run of the worker."""
        return self._started_at_ms

    def announce(self) -> None:
        """Say that this worker takes jobs, once its device does: routing counts on it from then on. Idempotent."""
        self._announced = True
        self._begin_heartbeat()
        self._canary.start()

    def to_front(self, wake_up: WakeUp) -> None:
        """Let a message that was sent just now be the next that is taken from its list. Raises StoreUnavailable."""
        priority = CELERY_PRIORITIES[wake_up.priority]
        list_name = list_of(wake_up.queue, priority, prefix=broker_prefix(self._settings))
        move_to_front(self._broker, wake_up.job_id, list_name)

    def leave(self, grace_s: float) -> None:
        """Take and be routed no new job; those in hand may end by themselves for `grace_s`, then they are given back.

        Asked again, it can only shorten the grace.
        """
        leave_by_s = time.monotonic() + grace_s
        first = self._grace is None
        if self._grace is not None:
            if leave_by_s >= self._leave_by_s:
                return
            self._grace.cancel()
        self._leaving, self._leave_by_s = True, leave_by_s
        self._grace = threading.Timer(grace_s, self.runner.give_back_all)
        self._grace.name, self._grace.daemon = "leave-grace", True
        self._grace.start()
        if first:
            # A signal may have come while this very thread holds a lock of the consumption, the heartbeat or the log.
            threading.Thread(target=self._begin_to_leave, args=(grace_s,), name="leave", daemon=True).start()

    def drain(self, grace_s: float) -> None:
        """Leave, and once no job is in hand have the worker shut down. Returns at once."""
        leaving = self._leaving
        self.leave(grace_s)
        if not leaving:
            threading.Thread(target=self._end_once_idle, name="drain", daemon=True).start()

    def close(self) -> None:
        """Wait for what runs, then end everything, last started first. Idempotent."""
        self.runner.wait_idle()
        if self._grace is not None:
            self._grace.cancel()
        self._undo.close()
        if self._stuck.locked():
            # A thread that hangs in the device would keep the process: show where, and end it.
            faulthandler.dump_traceback_later(1.0, exit=True, file=2)

    def _hear_cancels(self, feed: EventFeed, undo: ExitStack) -> None:
        try:
            feed.on_cancel(self.runner.cancel)
        except StoreUnavailable as error:
            logger.warning("This worker waits for its store: %s", error)
            closing = threading.Event()
            later = threading.Thread(
                target=_hear_cancels_later,
                args=(feed, self.runner.cancel, closing),
                name="cancel-notices",
                daemon=True,
            )
            undo.callback(later.join, CLOSE_TIMEOUT_S)
            undo.callback(closing.set)
            later.start()

    def _child(self, config: HostConfig) -> ProcessHost:
        return ProcessHost(
            config,
            log_level=self._settings.log_level,
            log_json=self._settings.log_json,
            recycling=Recycling(self._settings.recycle_after_jobs, self._settings.recycle_above_bytes),
            on_line=_relay,
            on_available=self._set_available,
            on_unusable=lambda _: self._consumption.end(EXIT_UNUSABLE),
        )

    def _set_available(self, available: bool) -> None:
        self._available = available
        self._admit()
        self._begin_heartbeat()

    def _set_crowded(self, crowded: bool) -> None:
        self._crowded = crowded
        self._admit()

    def _admit(self) -> None:
        with self._admitting:
            free = self._available and not self._crowded and not self._leaving
            self._consumption.admit(self._concurrency if free else 0)

    def _begin_heartbeat(self) -> None:
        with self._announcing:
            if self._announced and self._available:
                self._heartbeat.start()

    def _begin_to_leave(self, grace_s: float) -> None:
        logger.info("This worker leaves; %d jobs in hand have %g s to end.", self.runner.running, grace_s)
        self._withdraw()

    def _withdraw(self) -> None:
        self._admit()
        self._canary.close()
        self._heartbeat.withdraw()

    def _stick(self, detail: str) -> None:
        if not self._stuck.acquire(blocking=False):
            return
        logger.critical("The device does not come back; this worker gives its jobs back and ends. %s", detail)
        faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=2)
        self._heartbeat.withdraw()
        self.runner.give_back_all()
        self._consumption.end(EXIT_STUCK)

    def _end_once_idle(self) -> None:
        self._withdraw()
        self.runner.wait_idle()
        self._consumption.end(0)

    def _lose_consumption(self, hears: bool) -> None:
        """The end of a worker that takes nothing: in order if its consumer still hears of it, else by force."""
        if hears:
            logger.critical("This worker takes no messages, whatever is done; it ends, so that another may begin.")
            self._consumption.end(EXIT_STUCK)
            return
        logger.critical("The consumer of this worker hears nothing any more; it gives its jobs back and ends.")
        self._heartbeat.withdraw()
        self.runner.give_back_all()
        self.runner.wait_idle(LAST_WORDS_S)
        faulthandler.dump_traceback(file=2)
        os._exit(EXIT_STUCK)

    def _capability(self) -> WorkerCapability:
        host = self._host.capability()
        for model, ability in host.abilities.items():
            self._metrics.chunks_measured(model, ability.chunks)
        return WorkerCapability(
            worker_id=self._worker_id,
            backend=host.backend,
            device=host.device,
            device_name=host.device_name,
            memory_bytes=host.memory_bytes,
            memory_budget_bytes=host.memory_budget_bytes,
            queues=self._queues,
            models=host.models,
            loaded=host.loaded,
            concurrency=host.concurrency,
            running=self.runner.running,
            tags=self._settings.tags,
            dtypes=host.dtypes,
            features=host.features,
            ranks_max=host.ranks_max,
            abilities=dict(host.abilities),
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at_ms=self._started_at_ms,
        )


def _served_beside(fleet: Fleet, worker_id: str, job: StoredJob) -> bool:
    """Whether another live worker could run the job; not, as far as is known, while the store is away."""
    try:
        others = [worker for worker in fleet.live() if worker.worker_id != worker_id]
    except StoreUnavailable:
        return False
    return any(job.queue in worker.queues and job.resolved.model in worker.models for worker in others)


def placement_of(settings: Settings, backend: str) -> Placement:
    """Where the device side of a worker for this backend lives."""
    if settings.placement is not Placement.AUTO:
        return settings.placement
    return Placement.THREAD if backend == Backend.CPU_STUB else Placement.PROCESS


def host_config(settings: Settings, plan: Plan, device: str, concurrency: int) -> HostConfig:
    """What the device side of a worker is made from. Raises ConfigurationError for a warm-up that it cannot serve."""
    served = tuple(spec.id for spec in plan.models)
    if strange := [model for model in settings.warm_up if model not in served]:
        raise ConfigurationError(
            f"OMNIRT_WARM_UP names {', '.join(strange)}; this worker serves {', '.join(served)}.",
            "Name some of these, or serve their queues too.",
        )
    budget_bytes = settings.memory_budget_bytes
    if budget_bytes is None and plan.backend in SHARED_BACKENDS and settings.cpu_devices > 1:
        host_bytes = host_memory_bytes()  # the workers of this host share it
        budget_bytes = None if host_bytes is None else int(BUDGET_SHARE * host_bytes / settings.cpu_devices)
    return HostConfig(
        backend=plan.backend,
        device=device,
        models=served,
        folders=plan.folders,
        cache_size=settings.pipeline_cache_size,
        concurrency=concurrency,
        torch_threads=settings.torch_threads,
        memory_budget_bytes=budget_bytes,
        warm_up=settings.warm_up,
        max_batch_size=settings.max_batch_size,
        batch_window_ms=settings.batch_window_ms,
        chunk_table=table_path(settings.chunk_dir, plan.backend, device),
    )


def _thread_host(config: HostConfig) -> ThreadHost:
    host = ThreadHost.from_config(config)
    try:
        host.warm_up()
    except BaseException:
        host.close(CLOSE_TIMEOUT_S)
        raise
    return host


def _relay(line: str) -> None:
    """What the child writes is written here: it logs as this process does."""
    sys.stderr.write(f"{line}\n")


def _hear_cancels_later(feed: EventFeed, cancel: Callable[[str], None], closing: threading.Event) -> None:
    """Listen to the feed's cancels once the store is there; of those before, the renewals of the leases tell."""
    while not closing.wait(LISTEN_AGAIN_S):
        with suppress(StoreUnavailable):  # told already
            feed.on_cancel(cancel)
            return
