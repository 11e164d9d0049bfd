"""ThreadHost: the `thread` placement of a DeviceHost; engine and device live in the caller's process.

submit(order) ─► a thread per run ─► ModelCache ─► executor ─► DeviceThread
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from omnirt_tasks.contract import ErrorInfo, ExecutionMode
from omnirt_tasks.errors import ConfigurationError, OutOfMemory, WorkerLost
from omnirt_tasks.observability.logs import bound
from omnirt_tasks.registry import LoadRequest, ModelSpec, discover
from omnirt_tasks.registry.footprint import run_working_bytes
from omnirt_tasks.registry.work import megapixel_steps
from workers.backends import BackendDriver, DeviceInfo, driver
from workers.cache import ModelCache
from workers.chunks.limits import MeasuredLimits
from workers.chunks.members import Member
from workers.context import WAITING, Interrupted, JobContext
from workers.device import DeviceThread
from workers.executors import Executor, LoadedModel, executor_for
from workers.host import (
    DeviceCapability,
    HostConfig,
    HostHealth,
    InterruptReason,
    OnEvent,
    RunFacts,
    RunFailed,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)
from workers.loading import HOLDS_THE_DEVICE, ModelKey, Shelf
from workers.pace import Pace
from workers.run_errors import broken_off, causes, explain

log = logging.getLogger(__name__)


# What models and runs may take of a device's memory; the rest is for the libraries, and for what nobody counts.
BUDGET_SHARE = 0.9
LOAD = "load"


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
        memory_budget_bytes: int | None = None,
        warm_up: Sequence[str] = (),
        max_batch_size: int | None = None,
        batch_window_ms: float = 0.0,
        chunk_table: Path | None = None,
        limits: MeasuredLimits | None = None,
    ) -> None:
        """Take the device.

        `models` are those that this host serves and can run, `folders` where their weights lie, by model id; the stub
        has none. `cache_size` is the most models kept loaded, `memory_budget_bytes` the most that they and the runs
        take of the device's memory together (nine tenths of it by default), `concurrency` the most runs the host is to
        be given at once. `warm_up` names the models that `warm_up` loads.
        `max_batch_size` is the most runs that share a device call (as many as pays by default; 1: none do),
        `batch_window_ms` how long the first of them waits for others, unless its model says; `chunk_table` is the file
        that keeps what was measured of sharing. `limits` are in their place, where something else than paying is to
        decide.
        Raises ConfigurationError when the backend has no such device here, or `warm_up` names more than `cache_size`.
        """
        self._driver = backend
        self._concurrency = concurrency
        self._info = _device_of(backend)
        self._features = backend.features()
        self._shelf = Shelf(models, folders, self._info, backend.torch_device)
        if len(warm_up) > cache_size:
            raise ConfigurationError(
                f"{len(warm_up)} models are to be loaded first ({', '.join(warm_up)}), and {cache_size} are kept.",
                "Set OMNIRT_PIPELINE_CACHE_SIZE to that many, or name fewer in OMNIRT_WARM_UP.",
            )
        self._warm_up = tuple(warm_up)
        self._budget_bytes = memory_budget_bytes
        if memory_budget_bytes is None and self._info.memory_bytes is not None:
            self._budget_bytes = int(BUDGET_SHARE * self._info.memory_bytes)
        self._executors: dict[str, Executor] = {}
        self._cache: ModelCache[ModelKey, LoadedModel] = ModelCache(
            cache_size, self._release, budget_bytes=self._budget_bytes
        )
        self._pace = Pace()
        self._broken_loads: set[int] = set()  # the threads whose load broke off; adding and discarding are atomic
        self._lock = threading.Lock()  # guards the runs, the executors, the closing and the loss
        self._runs: list[_Run] = []
        self._closed = False
        self._lost = False  # the device is, for this process
        self._max_batch_size = max_batch_size
        self._batch_window_ms = batch_window_ms
        self._limits = limits or MeasuredLimits(chunk_table, backend=backend.name, device_name=self._info.name)
        self._device = DeviceThread(backend, limits=self._limits)

    @classmethod
    def from_config(cls, config: HostConfig, models: Sequence[ModelSpec] | None = None) -> Self:
        """The host that the config describes; `models` are the specs of its ids, from the catalog by default.

        Raises ConfigurationError as the constructor does, or ModelNotFound.
        """
        if models is None:
            catalog = discover()
            models = [catalog.find(model) for model in config.models]
        return cls(
            backend=driver(config.backend, config.device, config.torch_threads),
            models=models,
            folders=config.folders,
            cache_size=config.cache_size,
            concurrency=config.concurrency,
            memory_budget_bytes=config.memory_budget_bytes,
            warm_up=config.warm_up,
            max_batch_size=config.max_batch_size,
            batch_window_ms=config.batch_window_ms,
            chunk_table=config.chunk_table,
        )

    def warm_up(self) -> None:
        """Load the models that this was asked of, each as most of its jobs want it.

        Raises what fails, and ConfigurationError when they do not fit together.
        """
        for model in self._warm_up:
            spec = self._shelf.spec(model)
            with self._driver.guard(), self._in_use(spec, self._shelf.default_request(spec)):
                pass
        loaded = self._shelf.ids_loaded(self._cache.loaded())
        if gone := [model for model in self._warm_up if model not in loaded]:
            raise ConfigurationError(
                f"{', '.join(gone)} had to go for the other models of OMNIRT_WARM_UP.",
                "Name fewer in OMNIRT_WARM_UP, or set a larger OMNIRT_MEMORY_BUDGET_BYTES.",
            )

    def unload_idle(self) -> None:
        """Give back the memory of every model that no run uses."""
        self._cache.clear()

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        outcome: Future[RunOutcome] = Future()
        outcome.set_running_or_notify_cancel()  # a run is stopped by `interrupt`, not through its future
        job = JobContext(order, self._device, on_event)
        with self._lock:
            if self._closed:
                outcome.set_result(RunInterrupted(InterruptReason.GIVE_BACK))
                return outcome
            if self._lost:
                outcome.set_result(_lost())
                return outcome
            thread = threading.Thread(
                target=self._run,
                args=(job, outcome, not self._runs),
                name=f"omnirt-job-{order.job_id[:8]}-{order.attempt}",
                daemon=True,
            )
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
        return DeviceCapability(
            backend=self._driver.name,
            device=self._info.device,
            device_name=self._info.name,
            memory_bytes=self._info.memory_bytes,
            dtypes=self._info.dtypes,
            models=self._shelf.ids,
            loaded=self._shelf.ids_loaded(self._cache.loaded()),
            concurrency=self._concurrency,
            memory_budget_bytes=self._budget_bytes,
            features=self._features,
            ranks_max=self._info.ranks_max,
            abilities=self._shelf.abilities(self._pace.seconds_per_unit, self._limits.chunks),
        )

    def health(self) -> HostHealth:
        stuck_for_s = self._device.busy_for_s()
        if self._closed:
            return HostHealth(ok=False, detail="closed", stuck_for_s=stuck_for_s)
        if not self._device.alive:
            return HostHealth(ok=False, detail="the device thread has ended", stuck_for_s=stuck_for_s)
        if self._lost:
            return HostHealth(ok=False, detail="the device is lost", stuck_for_s=stuck_for_s)
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
        self._limits.save(at_once=True)
        self._cache.clear()

    # One run, in its own thread

    def _run(self, job: JobContext, outcome: "Future[RunOutcome]", alone: bool) -> None:
        order = job.order
        result: RunOutcome = RunFailed(broken_off())
        try:
            with bound(job_id=order.job_id, model=order.request.model):
                result = self._outcome(job, alone=alone)
                self._tidy()
        finally:  # whoever waits gets an outcome, even when telling of an error fails
            with self._lock:
                self._runs = [run for run in self._runs if run.job is not job]
            outcome.set_result(result)
        self._limits.save()

    def _outcome(self, job: JobContext, *, alone: bool) -> RunOutcome:
        """What became of the run: the one place where its errors end."""
        try:
            with job.entered(), self._driver.guard():
                if alone:  # what runs at the same time is counted together
                    self._driver.reset_peak()
                return self._succeeded(job)
        except Interrupted as interrupted:
            return RunInterrupted(interrupted.reason)
        except WorkerLost as lost:  # a process that the model lives in: as if it were this one
            return RunLost(str(lost))
        except BaseException as error:  # whatever a model raises is the job's alone
            if self._shares_loss(error):
                log.warning("run failed on a device that is lost", exc_info=True, extra={"attempt": job.order.attempt})
                return _lost()
            info = explain(error, job.member, self._driver)
            log.exception("run failed", extra={"attempt": job.order.attempt, "code": info.code})
        return self._failed(job, info)

    def _succeeded(self, job: JobContext) -> RunSucceeded:
        order, config = job.order, job.order.request.config
        job.check()
        spec = self._shelf.spec(order.request.model)
        executor = self._executor(spec)
        request = replace(self._shelf.load_request(spec, config), loaded_part=job.loaded_part)
        self._bound(job.member, spec)
        with self._in_use(spec, request, job) as (model, hit):
            if hit:
                job.cache_hit(spec.id)
            # What goes on from a checkpoint does only a part of the work.
            work = megapixel_steps(order.request) if order.resume_from is None else None
            with self._pace.measured(spec.id, work):
                outputs = executor.run(model, order, job)
            job.end_stage()
            placement = dict(model.placement)
            del model  # once it is let go, another run may evict it and count on its memory
        facts = RunFacts(
            execution_mode=spec.execution_mode,
            timings_ms=dict(job.timings_ms),
            stages=tuple(job.stages),
            device_placement=placement,
            config_used={"device": self._info.device} if "device" in config else {},
            cache_hits=tuple(job.cache_hits),
            peak_memory_bytes=self._driver.peak_memory_bytes(),
            batch_size=job.member.largest,
            batch_size_mean=round(job.member.mean, 3),
            batch_group_id=job.member.group_id,
            latent_stats=job.latent_stats,
        )
        return RunSucceeded(outputs, facts)

    def _bound(self, member: Member, spec: ModelSpec) -> None:
        """Set how much the run shares: what host and model allow."""
        sizes_max = [size for size in (self._max_batch_size, spec.max_batch_size) if size is not None]
        member.size_max = min(sizes_max, default=None)
        window_ms = self._batch_window_ms if spec.batch_window_ms is None else spec.batch_window_ms
        member.window_s = window_ms / 1000

    def _shares_loss(self, error: BaseException) -> bool:
        """Whether the run is lost with the device, and not known to be what the device was lost by.

        A device tells late of what broke it, to whoever calls next: of those that run together it may be any.
        """
        with self._lock:
            if self._lost:
                return True
            self._lost = any(self._driver.is_lost(told) for told in causes(error))
            return self._lost and len(self._runs) > 1

    def _failed(self, job: JobContext, info: ErrorInfo) -> RunFailed:
        try:
            job.stage_failed(info.code, info.message)
            if info.code == OutOfMemory.code:
                self._release()
        except Exception:
            log.exception("could not tell of a failed run")
        return RunFailed(info)

    # Models

    def _executor(self, spec: ModelSpec) -> Executor:
        with self._lock:
            mode = spec.execution_mode
            if mode not in self._executors:
                self._executors[mode] = executor_for(self._driver.name, mode)
            return self._executors[mode]

    def _in_use(
        self, spec: ModelSpec, request: LoadRequest, job: JobContext | None = None
    ) -> AbstractContextManager[tuple[LoadedModel, bool]]:
        """The model and whether it was loaded before, kept with what the job needs beside it; None is no job."""
        if spec.execution_mode is ExecutionMode.SUBPROCESS:  # a program keeps nothing, and takes no model's place
            if job is not None:
                job.stage(LOAD)
            return nullcontext((self._load(spec, request), False))
        key, load = self._shelf.key(spec, request), partial(self._load, spec, request)
        estimate_bytes = self._shelf.estimate_bytes(spec, request.dtype)
        if job is None:
            return self._cache.use(key, load, estimate_bytes=estimate_bytes)
        asked = job.order.request
        return self._cache.use(
            key,
            load,
            estimate_bytes=estimate_bytes,
            working_bytes=run_working_bytes(spec, spec.tasks[asked.task], asked),
            request=asked,
            check=job.check,
            woken_by=job.woken_by,
            waits=partial(job.stage, WAITING),
            admitted=partial(job.stage, LOAD),
        )

    def _load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        self._shelf.require_sound(spec)
        try:
            model = self._executor(spec).load(spec, request)
        except BaseException:
            self._broken_loads.add(threading.get_ident())
            raise
        if spec.execution_mode not in HOLDS_THE_DEVICE:
            self._shelf.note_sharing(spec, model.sharing)
        return model

    def _tidy(self) -> None:
        """Give back what a load of this thread held when it broke off; its error, which held it too, has gone."""
        if (thread := threading.get_ident()) in self._broken_loads:
            self._broken_loads.discard(thread)
            self._release()

    def _release(self) -> None:
        if not self._lost:  # what a lost device holds goes with its process
            self._driver.release()


def _device_of(backend: BackendDriver) -> DeviceInfo:
    for info in backend.probe():
        if info.device == backend.device:
            return info
    raise ConfigurationError(
        f"This host has no device {backend.device!r} of the backend {backend.name!r}.",
        "Install the backend's software, or name a device that is there.",
    )


def _lost() -> RunLost:
    return RunLost("The device is lost to this process.")
