"""ThreadHost: the `thread` placement of a DeviceHost; engine and device live in the caller's process.

submit(order) ─► a thread per run ─► ModelCache ─► executor ─► DeviceThread
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.errors import ConfigurationError, Internal, ModelFailed, OmnirtError, OutOfMemory
from omnirt_tasks.observability.logs import bound
from omnirt_tasks.registry import LoadRequest, ModelSpec
from workers.backends import BackendDriver
from workers.cache import ModelCache
from workers.context import Interrupted, JobContext
from workers.device import DeviceThread
from workers.executors import Executor, LoadedModel, executor_for
from workers.host import (
    DeviceCapability,
    HostHealth,
    InterruptReason,
    OnEvent,
    RunFacts,
    RunFailed,
    RunInterrupted,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelKey:
    """What tells loaded models apart: weights and number format, not the task."""

    weights: str
    dtype: str


@dataclass(frozen=True)
class _Run:
    job: JobContext
    thread: threading.Thread


class ThreadHost:
    """Runs every order in a thread of its own; heavy modules in the device thread alone.

    Owns the device thread, the loaded models and the threads of the runs. Safe to share between threads.
    """

    def __init__(
        self,
        *,
        backend: BackendDriver,
        models: Sequence[ModelSpec],
        folders: Mapping[str, Path],
        cache_size: int,
        concurrency: int,
    ) -> None:
        """Take the device.

        `models` are those that this host serves and can run, `folders` where their weights lie, by model id; the stub
        has none. `cache_size` is the most models kept loaded, `concurrency` the most runs it is to be given at once.
        Raises ConfigurationError when the backend has no such device here.
        """
        self._driver = backend
        self._models = {spec.id: spec for spec in models}
        self._folders = dict(folders)
        self._concurrency = concurrency
        self._info = next((info for info in backend.probe() if info.device == backend.device), None)
        if self._info is None:
            raise ConfigurationError(
                f"This host has no device {backend.device!r} of the backend {backend.name!r}.",
                "Install the backend's software, or name a device that is there.",
            )
        self._executors: dict[str, Executor] = {}
        self._cache: ModelCache[ModelKey, LoadedModel] = ModelCache(cache_size, backend.release)
        self._lock = threading.Lock()  # guards the runs, the executors and the closing
        self._runs: list[_Run] = []
        self._closed = False
        self._device = DeviceThread(backend)

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        outcome: Future[RunOutcome] = Future()
        outcome.set_running_or_notify_cancel()  # a run is stopped by `interrupt`, not through its future
        job = JobContext(order, self._device, on_event)
        thread = threading.Thread(
            target=self._run, args=(job, outcome), name=f"omnirt-job-{order.job_id[:8]}-{order.attempt}", daemon=True
        )
        with self._lock:
            if self._closed:
                outcome.set_result(RunInterrupted(InterruptReason.GIVE_BACK))
                return outcome
            thread.start()
            self._runs.append(_Run(job, thread))
        return outcome

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        with self._lock:
            runs = sorted(
                (run.job for run in self._runs if run.job.order.job_id == job_id), key=lambda job: job.order.attempt
            )
        if reason is InterruptReason.LEASE_LOST and len(runs) > 1:
            runs.pop()  # the newest attempt is the one that the lease was lost to
        for job in runs:
            job.interrupt(reason)
        return bool(runs)

    def end_by_force(self, why: str) -> bool:
        del why
        return False  # nothing ends a thread

    def capability(self) -> DeviceCapability:
        assert self._info is not None
        loaded = {key.weights for key in self._cache.loaded()}
        return DeviceCapability(
            backend=self._driver.name,
            device=self._info.device,
            device_name=self._info.name,
            memory_bytes=self._info.memory_bytes,
            dtypes=self._info.dtypes,
            models=tuple(sorted(self._models)),
            loaded=tuple(sorted(model for model in self._models if self._weights(model) in loaded)),
            concurrency=self._concurrency,
        )

    def health(self) -> HostHealth:
        stuck_for_s = self._device.busy_for_s()
        if self._closed:
            return HostHealth(ok=False, detail="closed", stuck_for_s=stuck_for_s)
        if not self._device.alive:
            return HostHealth(ok=False, detail="the device thread has ended", stuck_for_s=stuck_for_s)
        return HostHealth(ok=True, stuck_for_s=stuck_for_s)

    def close(self, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
            runs = list(self._runs)
        for run in runs:
            run.job.interrupt(InterruptReason.GIVE_BACK)
        self._device.close(timeout_s / 2)  # what waits for a call that never returns has the other half to end
        for run in runs:
            run.thread.join(max(0.0, deadline_s - time.monotonic()))
        if left := [run.thread.name for run in runs if run.thread.is_alive()]:
            log.error("runs outlasted the closing of their host", extra={"runs": left})
        self._cache.clear()

    # One run, in its own thread

    def _run(self, job: JobContext, outcome: "Future[RunOutcome]") -> None:
        order = job.order
        result: RunOutcome = RunFailed(_broken_off())
        try:
            with bound(job_id=order.job_id, model=order.request.model):
                result = self._outcome(job)
        finally:  # whoever waits gets an outcome, even when telling of an error fails
            with self._lock:
                self._runs = [run for run in self._runs if run.job is not job]
            outcome.set_result(result)

    def _outcome(self, job: JobContext) -> RunOutcome:
        """What became of the run: the one place where its errors end."""
        try:
            with job.entered(), self._driver.guard():
                return self._succeeded(job)
        except Interrupted as interrupted:
            return RunInterrupted(interrupted.reason)
        except BaseException as error:  # whatever a model raises is the job's alone
            info = self._explain(error)
            log.exception("run failed", extra={"attempt": job.order.attempt, "code": info.code})
        return self._failed(job, info)

    def _succeeded(self, job: JobContext) -> RunSucceeded:
        order = job.order
        job.check()
        spec = self._spec(order.request.model)
        executor = self._executor(spec)
        request = self._load_request(spec, order)
        job.stage("load")
        with self._cache.use(
            ModelKey(self._weights(spec.id), request.dtype),
            lambda: executor.load(spec, request),
            check=job.check,
            woken_by=job.woken_by,
        ) as (model, hit):
            if hit:
                job.cache_hit(spec.id)
            outputs = executor.run(model, order, job)
            job.end_stage()
            placement = dict(model.placement)
        facts = RunFacts(
            execution_mode=spec.execution_mode,
            timings_ms=dict(job.timings_ms),
            stages=tuple(job.stages),
            device_placement=placement,
            cache_hits=tuple(job.cache_hits),
            peak_memory_bytes=self._driver.peak_memory_bytes(),
            latent_stats=job.latent_stats,
        )
        return RunSucceeded(outputs, facts)

    def _failed(self, job: JobContext, info: ErrorInfo) -> RunFailed:
        try:
            job.stage_failed(info.code, info.message)
            if info.code == OutOfMemory.code:
                self._driver.release()
        except Exception:
            log.exception("could not tell of a failed run")
        return RunFailed(info)

    def _explain(self, error: BaseException) -> ErrorInfo:
        if isinstance(error, OmnirtError):
            return error.info()
        if self._driver.is_out_of_memory(error):
            return OutOfMemory(
                "The device has too little memory for this job.",
                "Ask for fewer or smaller pictures, or for the preset low-vram.",
            ).info()
        if isinstance(error, Exception):
            return ModelFailed(
                f"The model's code raised {type(error).__name__}.", "The worker's log has the whole story."
            ).info()
        return _broken_off()

    # Models

    def _executor(self, spec: ModelSpec) -> Executor:
        with self._lock:
            mode = spec.execution_mode
            if mode not in self._executors:
                self._executors[mode] = executor_for(self._driver.name, mode)
            return self._executors[mode]

    def _spec(self, model: str) -> ModelSpec:
        spec = self._models.get(model)
        if spec is None:
            raise ModelFailed(
                f"This worker does not serve the model {model!r} on {self._driver.name}, or has not its weights.",
                "The operator names their folder in OMNIRT_MODEL_FOLDERS.",
            )
        return spec

    def _load_request(self, spec: ModelSpec, order: RunOrder) -> LoadRequest:
        assert self._info is not None
        dtype = str(order.request.config.get("dtype", "fp32"))
        if dtype not in self._info.dtypes:  # another would make the report tell what did not happen
            raise ModelFailed(
                f"The device {self._info.device} does not compute in {dtype}.",
                f"Ask for the dtype {' or '.join(self._info.dtypes)}.",
            )
        return LoadRequest(self._folders.get(spec.id, Path()), self._driver.torch_device, dtype)

    def _weights(self, model: str) -> str:
        return str(self._folders.get(model, f"model:{model}"))


def _broken_off() -> ErrorInfo:
    return Internal("The run was broken off.", "The worker's log has the whole story.").info()
