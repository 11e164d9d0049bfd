"""OmniEngine: jobs in this process, with no Redis, no Celery and no gateway.

submit ─► Submission (store in memory) ─► a line and a pool of threads ─► AttemptRunner ─► ThreadHost
                                             └─◄ Reconciler: what waited for its retry
"""

import itertools
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import PriorityQueue
from time import monotonic
from typing import Self

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import (
    AUTO,
    Backend,
    CancelOutcome,
    Event,
    GenerateRequest,
    JobRecord,
    JobState,
    WorkerCapability,
)
from omnirt_tasks.errors import BackendUnsupported, ConfigurationError, Internal, JobTimeout, OmnirtError
from omnirt_tasks.jobs.effects import RANKS
from omnirt_tasks.jobs.housekeeping import everyones_turn
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.memory_feed import MemoryFeed
from omnirt_tasks.jobs.reconciler import Reconciler
from omnirt_tasks.jobs.values import Claim, Failed, JobQuery, Origin, StoredJob, WakeUp
from omnirt_tasks.jobs.watch import wait_finished, watch
from omnirt_tasks.registry import Catalog, discover
from omnirt_tasks.routing import parse_queue
from omnirt_tasks.settings import Settings, load_settings
from omnirt_tasks.submission import Submission
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import Door
from workers.attempts import AttemptRunner
from workers.backends import driver
from workers.chunks.limits_file import table_path
from workers.host import DeviceHost
from workers.own_fleet import OwnFleet
from workers.plan import Plan, plan_for_backend
from workers.thread_host import ThreadHost

logger = logging.getLogger(__name__)

NOBODY = ""  # the owner of every job here
WORKER_ID = "engine"
LEASE_TTL_S = 60.0  # nobody else could take a job
RECORD_TTL_S = 24 * 3600.0
LONG_S = 365 * 24 * 3600.0
CLOSE_TIMEOUT_S = 10.0
BATCH_WINDOW_MS_MAX = 60_000
RECONCILE_EVERY_S = 0.25


class OmniEngine:
    """Runs jobs in this process; models stay loaded between them. Safe to share between threads.

    `max_concurrency` jobs, or parts of one, run at once, and `pipeline_cache_size` models stay loaded per device.
    `backend` is "auto" for whatever this host has, or the only one to use. Outputs are files in `output_dir`, or in a
    temporary folder that goes with the engine. At most `max_batch_size` jobs share a forward pass (None: as many as
    pays, as measured; 1: none do), the first of which waits `batch_window_ms` for others; more join later. What was
    measured is kept in `chunk_dir`, where workers on these devices find it too, or goes with the engine.
    `settings` are this process's own by default: the folders of models, limits and previews come from there.

    A device is taken when the first job for it comes. Raises ConfigurationError for a backend that is not here.
    """

    def __init__(
        self,
        max_concurrency: int = 2,
        batch_window_ms: float = 0,
        max_batch_size: int | None = None,
        pipeline_cache_size: int = 2,
        backend: str = AUTO,
        *,
        output_dir: Path | str | None = None,
        chunk_dir: Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        _check_bounds(max_concurrency, batch_window_ms, max_batch_size, pipeline_cache_size)
        self._settings = settings if settings is not None else load_settings()
        self._max_concurrency = max_concurrency
        self._batch_window_ms = batch_window_ms
        self._max_batch_size = max_batch_size
        self._pipeline_cache_size = pipeline_cache_size
        self._chunk_dir = chunk_dir
        self._plans = self._plans_for(backend)
        self._own_dir = Path(tempfile.mkdtemp(prefix="omnirt-engine-"))
        self._output_dir = Path(output_dir).expanduser().absolute() if output_dir is not None else None
        self._artifacts = ArtifactStorage((self._output_dir or self._own_dir).as_uri())
        self._uploads = UploadStorage(
            self._own_dir.as_uri(),
            ttl_s=RECORD_TTL_S,
            max_bytes=self._settings.max_upload_bytes,
            max_pixels=self._settings.max_image_pixels,
        )
        self._store = MemoryJobStore(
            job_ttl_s=RECORD_TTL_S,
            deaths_max=self._settings.deaths_max,
            promote_after_s=self._settings.promote_after_s,
        )
        self._feed = MemoryFeed(self._store)
        self._feed.on_cancel(self._interrupt)
        self._catalog = self._catalog_of_plans()
        self._fleet = OwnFleet(WORKER_ID, self._plans.values(), tags=self._settings.tags, concurrency=max_concurrency)
        self._submission = Submission(
            store=self._store,
            catalog=self._catalog,
            fleet=self._fleet,
            uploads=self._uploads,
            send=self._send,
            door=Door(),
            max_batch_size=max_batch_size,
        )
        self._line = _Line()
        self._pool = ThreadPoolExecutor(max_concurrency, thread_name_prefix="omnirt-engine")
        self._taking = threading.Lock()  # guards the devices, and is held while one is taken
        self._devices: dict[str, tuple[DeviceHost, AttemptRunner]] = {}
        self._closing = threading.Lock()  # guards: nothing is given to the pool once the engine is closed
        self._closed = False
        self._reconciler = Reconciler(
            self._store,
            every_s=RECONCILE_EVERY_S,
            unclaimed_after_s=LONG_S,  # a job that waits is in the pool
            resend=self._again,
            waiting_in_broker=lambda _: frozenset(),
            remove_files=self._remove_files,
            turn=everyones_turn,
        )
        self._reconciler.start()

    def submit(self, request: GenerateRequest) -> JobRecord:
        """Queue a job. Its `backend` is one that this engine has, or "auto".

        Raises what validation found, BackendUnsupported when the model cannot run here, and ConfigurationError once
        the engine is closed.
        """
        if self._closed:
            raise _closed_engine()
        spec = self._catalog.find(request.model)
        if not spec.backends:
            raise BackendUnsupported(
                f"The model {spec.id!r} cannot run in this engine, which has {', '.join(self._plans)}.",
                "Name its weights in OMNIRT_MODEL_FOLDERS, or use another backend.",
            )
        return self._submission.submit(request, owner=NOBODY).record

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobRecord:
        """The record of the job once it is over.

        Raises JobNotFound, and JobTimeout after `timeout_s` (None: no limit); the job goes on then.
        """
        job = wait_finished(self._store, self._feed, job_id, timeout_s=LONG_S if timeout_s is None else timeout_s)
        if job is None:
            raise JobTimeout(f"The job {job_id} is not over after {timeout_s:g} s.", "Wait again, or cancel it.")
        return job.record

    def job(self, job_id: str) -> JobRecord:
        """The job as it stands. Raises JobNotFound."""
        return self._store.get(job_id).record

    def events(self, job_id: str, *, after: int = 0, timeout_s: float | None = None) -> Iterator[Event]:
        """The job's events with seq > `after`, as they come, until it is over.

        Raises JobNotFound, and JobTimeout when it is not over after `timeout_s` (None: no limit).
        """
        deadline_s = monotonic() + (LONG_S if timeout_s is None else timeout_s)
        patience_s = 1.0 if timeout_s is None else min(1.0, max(timeout_s / 10, 0.01))
        with closing(watch(self._store, self._feed, job_id, after=after, keepalive_s=patience_s)) as events:
            for event in events:
                if event is not None:
                    yield event
                if monotonic() > deadline_s and not (event is not None and event.terminal):
                    raise JobTimeout(f"The job {job_id} is not over after {timeout_s:g} s.", "Cancel it, or go on.")

    def capabilities(self) -> Sequence[WorkerCapability]:
        """What its devices can do, and what was measured on those that it has taken."""
        return self._fleet.live()

    def cancel(self, job_id: str) -> CancelOutcome:
        """Cancel the job: at once if it waits, at its next device call if it runs. Idempotent. Raises JobNotFound."""
        return self._store.cancel(job_id)

    def close(self) -> None:
        """Cancel what is not over, wait for it, and let go of the devices. Idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._reconciler.close()
        for state in (JobState.QUEUED, JobState.RUNNING):
            self._cancel_all(state)
        self._pool.shutdown(wait=True, cancel_futures=True)
        for host, runner in self._devices.values():
            runner.close()
            host.close(CLOSE_TIMEOUT_S)
        self._feed.close()
        shutil.rmtree(self._own_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plans_for(self, backend: str) -> dict[str, Plan]:
        names = [name for name in Backend if backend in {AUTO, name}]
        plans: dict[str, Plan] = {}
        for name in names:
            plan = plan_for_backend(name, discover(), self._settings)
            try:
                if plan is not None and driver(name).probe():
                    plans[str(name)] = plan
            except ConfigurationError:
                if backend != AUTO:
                    raise
        if not plans:
            raise ConfigurationError(f"This host has nothing to run on the backend {backend!r}.", 'Use "auto".')
        return plans

    def _catalog_of_plans(self) -> Catalog:
        """Every model, with those of its backends alone that it can run on in this engine."""
        runnable = {(spec.id, plan.backend) for plan in self._plans.values() for spec in plan.models}
        return Catalog(
            replace(spec, backends=tuple(backend for backend in spec.backends if (spec.id, backend) in runnable))
            for spec in discover()
        )

    def _send(self, wake_up: WakeUp) -> None:
        if not self._take(wake_up):
            raise _closed_engine()

    def _again(self, wake_up: WakeUp) -> None:
        self._take(wake_up)

    def _take(self, wake_up: WakeUp) -> bool:
        """Put the job in the line for the pool; false, and it is cancelled, once the engine is closed."""
        with self._closing:
            if not self._closed:
                self._line.put(wake_up)
                self._pool.submit(self._run_first)
                return True
        part = self._store.get(wake_up.job_id).part
        self._store.cancel(wake_up.job_id if part is None else part.job_id)
        return False

    def _run_first(self) -> None:
        wake_up = self._line.take()
        try:
            runner = self._runner(parse_queue(wake_up.queue).backend)
            end = runner.run(wake_up.job_id) if runner is not None else None
            if end is not None and end.to_send:
                for again in end.job.wake_ups:
                    self._again(again)
        except Exception as error:  # the boundary of the pool's thread: the job must still end
            logger.exception("Job %s could not be begun.", wake_up.job_id)
            self._fail(wake_up.job_id, error)

    def _fail(self, job_id: str, error: Exception) -> None:
        known = error if isinstance(error, OmnirtError) else Internal("The job could not be begun; the log has why.")
        claim = self._store.claim(job_id, worker_id=WORKER_ID, lease_ttl_ms=round(LEASE_TTL_S * 1000), alone=True)
        if isinstance(claim, Claim):  # it was cancelled meanwhile otherwise
            self._store.commit(claim.lease, Failed(known.info()))

    def _runner(self, backend: str) -> AttemptRunner | None:
        with self._taking:
            if self._closed:
                return None
            if backend not in self._devices:
                self._devices[backend] = self._take_device(self._plans[backend])
                self._fleet.has_taken(backend, self._devices[backend][0])
            return self._devices[backend][1]

    def _take_device(self, plan: Plan) -> tuple[DeviceHost, AttemptRunner]:
        device = driver(plan.backend, None, self._settings.torch_threads)
        host = ThreadHost(
            backend=device,
            models=plan.models,
            folders=plan.folders,
            cache_size=self._pipeline_cache_size,
            concurrency=self._max_concurrency,
            memory_budget_bytes=self._settings.memory_budget_bytes,
            max_batch_size=self._max_batch_size,
            batch_window_ms=self._batch_window_ms,
            chunk_table=None if self._chunk_dir is None else table_path(self._chunk_dir, plan.backend, device.device),
        )
        runner = AttemptRunner(
            store=self._store,
            host=host,
            artifacts=self._artifacts,
            uploads=self._uploads,
            worker_id=f"{WORKER_ID}-{plan.backend}",
            scratch_dir=self._own_dir / "scratch" / plan.backend,
            lease_ttl_s=LEASE_TTL_S,
            job_timeout_s=self._settings.job_timeout_s,
            preview_every_steps=self._settings.preview_every_steps,
            retries_max=self._settings.retries_max,
            retry_backoff_s=self._settings.retry_backoff_s,
            address=self._address,
            execution_mode=plan.execution_mode,
        )
        return host, runner

    def _address(self, _job_id: str, origin: Origin, name: str) -> tuple[str, str | None]:
        return str(self._artifacts.local_path(origin.job_id, origin.attempt, name)), None

    def _interrupt(self, job_id: str) -> None:
        for _, runner in list(self._devices.values()):
            runner.cancel(job_id)

    def _cancel_all(self, state: JobState) -> None:
        query = JobQuery(owner=NOBODY, limit=100, state=state)
        while True:
            page = self._store.page(query)
            for job in page.jobs:
                self._store.cancel(job.record.id)
            if page.next_cursor is None:
                return
            query = JobQuery(owner=NOBODY, limit=100, state=state, cursor=page.next_cursor)

    def _remove_files(self, job: StoredJob) -> None:
        if self._output_dir is None:  # files in a folder of the caller's are the caller's
            for job_id in (job.record.id, *job.parts):
                self._artifacts.remove_job(job_id)
        self._uploads.remove_inputs(job.record.id, job.resolved.inputs)


class _Line:
    """What waits for a thread of the pool: the higher priority first, and of those the one that came first."""

    def __init__(self) -> None:
        self._waiting: PriorityQueue[tuple[int, int, WakeUp]] = PriorityQueue()
        self._numbers = itertools.count()

    def put(self, wake_up: WakeUp) -> None:
        """Let it wait."""
        self._waiting.put((RANKS[wake_up.priority], next(self._numbers), wake_up))

    def take(self) -> WakeUp:
        """The first, which is in the line no more. As often as `put`, before or after."""
        _, _, wake_up = self._waiting.get()
        return wake_up


def _check_bounds(
    max_concurrency: int, batch_window_ms: float, max_batch_size: int | None, pipeline_cache_size: int
) -> None:
    """Raises ConfigurationError for a number that is too small, or no number."""
    at_least_one = {
        "max_concurrency": max_concurrency,
        "max_batch_size": 1 if max_batch_size is None else max_batch_size,
        "pipeline_cache_size": pipeline_cache_size,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ConfigurationError(f"{name} is {value}.", "Use 1 or more.")
    if not 0 <= batch_window_ms <= BATCH_WINDOW_MS_MAX:  # NaN is not either
        raise ConfigurationError(f"batch_window_ms is {batch_window_ms}.", f"Use 0 to {BATCH_WINDOW_MS_MAX}.")


def _closed_engine() -> ConfigurationError:
    return ConfigurationError("The engine is closed.", "Make another.")
