"""Everything that one worker process runs beside Celery, in the order in which it starts and ends.

device host ─ attempts ─ cancel notices ─ reconciler ─ heartbeat
"""

import faulthandler
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

from prometheus_client import CollectorRegistry

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.store import EventFeed
from omnirt_tasks.observability import tracing
from omnirt_tasks.observability.metrics import DeviceMetrics, MetricsServer
from omnirt_tasks.routing import queues_served
from omnirt_tasks.settings import Settings
from omnirt_tasks.stores import open_stores
from workers.attempts import AttemptRunner
from workers.backends import driver
from workers.devices import DeviceLock
from workers.heartbeat import Heartbeat
from workers.host import DeviceHost
from workers.plan import Plan
from workers.thread_host import ThreadHost

logger = logging.getLogger(__name__)

SERVICE = "omnirt-worker"
SCRATCH_FOLDER = "scratch"
LAST_WORDS_S = 15.0
CLOSE_TIMEOUT_S = 5.0
LISTEN_AGAIN_S = 0.5


class Serving:
    """A worker at work on its device, from construction to `close`.

    `resend` puts a job's message on its queue. `on_stuck` is called once, from any thread, when the device does not
    come back: the worker is to take no more messages, and to end.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        device: DeviceLock,
        *,
        worker_id: str,
        concurrency: int,
        resend: Callable[[str, str], None],
        on_stuck: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._worker_id = worker_id
        self._on_stuck = on_stuck
        self._stuck = threading.Lock()  # taken once, and never let go
        self._grace: threading.Timer | None = None
        self._started_at_ms = unix_ms()
        with ExitStack() as undo:
            stores = open_stores(settings)
            undo.callback(stores.close)
            tracer = tracing.start(settings, service=SERVICE)
            undo.callback(tracer.close)
            registry = CollectorRegistry()
            if settings.metrics_port is not None:
                undo.callback(MetricsServer(registry, host=settings.metrics_host, port=settings.metrics_port).close)
            self._host: DeviceHost = ThreadHost(
                backend=driver(plan.backend, device.device, settings.torch_threads),
                models=plan.models,
                folders=plan.folders,
                cache_size=settings.pipeline_cache_size,
                concurrency=concurrency,
            )
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
                execution_mode=plan.execution_mode,
                tracing=tracer,
                metrics=DeviceMetrics(registry),
            )
            undo.callback(self.runner.close)
            undo.callback(stores.feed.close)  # before the runner, which its cancels reach
            try:
                stores.feed.on_cancel(self.runner.cancel)
            except StoreUnavailable as error:
                logger.warning("This worker waits for its store: %s", error)
                closing = threading.Event()
                later = threading.Thread(
                    target=_hear_cancels,
                    args=(stores.feed, self.runner.cancel, closing),
                    name="cancel-notices",
                    daemon=True,
                )
                undo.callback(later.join, CLOSE_TIMEOUT_S)
                undo.callback(closing.set)
                later.start()

            reconciler = stores.reconciler(resend)
            undo.callback(reconciler.close)
            reconciler.start()
            self._heartbeat = Heartbeat(stores.fleet, self._capability, every_s=settings.heartbeat_s)
            undo.callback(self._heartbeat.close)
            self._undo = undo.pop_all()

    @property
    def concurrency(self) -> int:
        """The most jobs that the device is given at once."""
        return self._host.capability().concurrency

    def announce(self) -> None:
        """Say that this worker takes jobs: routing counts on it from now on. Idempotent."""
        self._heartbeat.start()

    def leave(self, grace_s: float) -> None:
        """No new job is routed here; those in hand may end by themselves for `grace_s`, then they are given back.

        Asked again, it only shortens the grace to nothing.
        """
        if self._grace is None:
            self._grace = threading.Timer(grace_s, self.runner.give_back_all)
            self._grace.name, self._grace.daemon = "leave-grace", True
            self._grace.start()
            threading.Thread(target=self._heartbeat.withdraw, name="leave", daemon=True).start()
        elif grace_s == 0:
            self.runner.give_back_all()

    def close(self) -> None:
        """Wait for what runs, then end everything, last started first. Idempotent."""
        self.runner.wait_idle()
        if self._grace is not None:
            self._grace.cancel()
        self._undo.close()
        if self._stuck.locked():
            # A thread that hangs in the device would keep the process: show where, and end it.
            faulthandler.dump_traceback_later(1.0, exit=True, file=2)

    def _stick(self, detail: str) -> None:
        if not self._stuck.acquire(blocking=False):
            return
        logger.critical("The device does not come back; this worker gives its jobs back and ends. %s", detail)
        faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=2)
        self._heartbeat.withdraw()
        self.runner.give_back_all()
        self._on_stuck()

    def _capability(self) -> WorkerCapability:
        host = self._host.capability()
        return WorkerCapability(
            worker_id=self._worker_id,
            backend=host.backend,
            device=host.device,
            device_name=host.device_name,
            memory_bytes=host.memory_bytes,
            queues=queues_served(self._plan.queues, self._settings.tags),
            models=host.models,
            loaded=host.loaded,
            concurrency=host.concurrency,
            running=self.runner.running,
            tags=self._settings.tags,
            dtypes=host.dtypes,
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at_ms=self._started_at_ms,
        )


def _hear_cancels(feed: EventFeed, cancel: Callable[[str], None], closing: threading.Event) -> None:
    """Listen to the feed's cancels once the store is there; of those before, the renewals of the leases tell."""
    while not closing.wait(LISTEN_AGAIN_S):
        with suppress(StoreUnavailable):  # told already
            feed.on_cancel(cancel)
            return
