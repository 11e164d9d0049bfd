"""JobContext: one run's own state: interrupt flag, stages, steps, events.

the job's thread ── enter ──► current_job() ◄── wrapped modules, scheduler.step
                                   │ check · stage · device call · step · preview
                                   └──► HostEvents, timings, timeline
"""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import EventName
from omnirt_tasks.contract.base import JsonObject
from workers.chunks.calls import DeviceCall
from workers.chunks.members import Member
from workers.device import DeviceClosed, DeviceThread
from workers.host import HostEvent, InterruptReason, OnEvent, RunOrder

# Makes a device call for a job, in the stage it belongs to (None: the present one).
OnDevice = Callable[[DeviceCall, str | None], Any]

DENOISE = "denoise"
"""The stage whose calls come again with each step: those who share them wait for each other."""
WAITING = "waiting"
"""The stage of a run that waits for memory, or until it has the device as a whole."""

_CURRENT: ContextVar["JobContext | None"] = ContextVar("omnirt_current_job", default=None)


class Interrupted(BaseException):
    """The run was asked to stop. No Exception, so that a pipeline's own handlers let it pass."""

    def __init__(self, reason: InterruptReason) -> None:
        super().__init__(reason)
        self.reason = reason


def current_job() -> "JobContext | None":
    """The job whose thread this is; None in any other thread, the device thread included."""
    return _CURRENT.get()


class JobContext:
    """One run of a job, from its thread's start to its end.

    Everything but the interrupt flag belongs to the job's own thread: events, stages, timings and facts are written
    there and nowhere else. `interrupt` may be called from any thread.
    """

    def __init__(self, order: RunOrder, device: DeviceThread, on_event: OnEvent) -> None:
        self.order = order
        self.device = device
        self.member = Member.of(order)
        self.cache_hits: list[str] = []
        self.latent_stats: JsonObject | None = None
        self.timings_ms: dict[str, float] = {}
        self.stages: list[tuple[str, int, int]] = []
        self.stand_in: OnDevice | None = None  # takes the denoiser's calls in the device's stead, while it is there
        self._on_event = on_event
        self._stage: str | None = None
        self._stage_since_s = 0.0
        self._stage_since_ms = 0
        self._lock = threading.Lock()  # guards the two below
        self._reason: InterruptReason | None = None
        self._wake: Callable[[], object] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this the current job of the thread at hand; once outside it has no more device calls."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)
            self.device.leave(self.member)

    # Interrupts

    def interrupt(self, reason: InterruptReason) -> None:
        """Ask the run to stop at its next device call, and wake it if it waits for one; the first reason stays."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
            wake = self._wake
        if wake is not None:
            wake()
        self.device.leave(self.member)

    def check(self) -> None:
        """Raise Interrupted if the run is to stop."""
        if self._reason is not None:
            raise Interrupted(self._reason)

    @contextmanager
    def woken_by(self, wake: Callable[[], object]) -> Iterator[None]:
        """While inside, an interrupt calls `wake`, at once if it came before."""
        with self._lock:
            self._wake = wake
            already = self._reason is not None
        try:
            if already:
                wake()
            yield
        finally:
            with self._lock:
                self._wake = None

    # Device calls

    def on_device(self, call: DeviceCall, stage: str | None = None) -> Any:
        """Have the device thread make the call, in the stage it belongs to (None: the present one).

        Raises Interrupted before the call begins if the run is to stop, or what the call raises.
        """
        self.check()
        if stage is not None:
            self.stage(stage)
        try:
            future = self.device.submit(call, self.member, denoises=stage == DENOISE)
            try:
                with self.woken_by(future.cancel):
                    return future.result()
            finally:
                del future  # it holds the result, or an error whose traceback holds this frame
        except CancelledError:
            self.check()
            raise
        except DeviceClosed:
            self.interrupt(InterruptReason.GIVE_BACK)
            raise Interrupted(self._reason or InterruptReason.GIVE_BACK) from None

    @contextmanager
    def device_held(self) -> Iterator[None]:
        """Have the device for this job alone while inside, once its turn comes. Raises Interrupted while it waits."""
        self.check()
        try:
            hold = self.device.hold()
        except DeviceClosed:
            self.interrupt(InterruptReason.GIVE_BACK)
            raise Interrupted(self._reason or InterruptReason.GIVE_BACK) from None
        try:
            if hold.waits:
                self.stage(WAITING)
            with self.woken_by(hold.release):
                wait([hold.mine])
            if hold.mine.cancelled():  # the device is closing, or the run is to stop
                self.interrupt(InterruptReason.GIVE_BACK)
            self.check()
            if hold.waits:
                self.end_stage()
            yield
        finally:
            hold.release()

    # What happened

    def stage(self, name: str) -> None:
        """Be in this stage from now on; the one before ends."""
        if name == self._stage:
            return
        self.end_stage()
        self._stage, self._stage_since_s, self._stage_since_ms = name, time.perf_counter(), unix_ms()
        self.emit(EventName.STAGE_START, name)

    def end_stage(self) -> None:
        """End the present stage, if there is one."""
        if (name := self._stage) is None:
            return
        elapsed_ms = round((time.perf_counter() - self._stage_since_s) * 1000, 3)
        self.timings_ms[name] = round(self.timings_ms.get(name, 0.0) + elapsed_ms, 3)
        self.stages.append((name, self._stage_since_ms, unix_ms()))
        self._stage = None
        self.emit(EventName.STAGE_END, name, {"elapsed_ms": elapsed_ms})

    def stage_failed(self, code: str, message: str) -> None:
        """Say that the run failed in the present stage; nothing follows it."""
        if (name := self._stage) is not None:
            self._stage = None
            self.emit(EventName.STAGE_ERROR, name, {"code": code, "message": message})

    def cache_hit(self, model: str) -> None:
        """Say that the model was loaded already."""
        self.cache_hits.append("model")
        self.emit(EventName.CACHE_HIT, self._stage or "load", {"cache": "model", "model": model})

    def step(self, step: int, total: int, timestep: float | None = None) -> None:
        """Say that step `step` (from 1) of `total` is done; after the last, nobody waits for the run any more."""
        if step >= total:
            self.device.leave(self.member)
        data: JsonObject = {"step": step, "total": total}
        if timestep is not None:
            data["timestep"] = timestep
        self.emit(EventName.STAGE_PROGRESS, self._stage or "denoise", data)

    def loaded_part(self, part: str, done: int, total: int) -> None:
        """Say that a part of the model is loaded, `done` of `total`. Raises Interrupted if the run is to stop."""
        self.check()
        self.emit(EventName.STAGE_PROGRESS, "load", {"step": done, "total": total, "module": part})

    def wants_preview(self, step: int, total: int) -> bool:
        """Whether this step is to be followed by a preview; the last one is not, the picture itself comes next."""
        every = self.order.preview_every_steps
        return every > 0 and step < total and step % every == 0

    def preview(self, step: int, mime: str, picture: bytes) -> None:
        """Show a small picture of how far the job has come."""
        data: JsonObject = {"step": step, "mime": mime, "data_b64": base64.b64encode(picture).decode("ascii")}
        self.emit(EventName.PREVIEW, self._stage or "denoise", data)

    def checkpoint(self, step: int, file: str) -> None:
        """Say that the state after `step` is kept, as `file` in the order's folder for checkpoints."""
        self.emit(EventName.CHECKPOINT, self._stage or "denoise", {"step": step, "file": file})

    def resumed(self, step: int, total: int) -> None:
        """Say that the run goes on after step `step` of `total`, which another attempt has made."""
        self.emit(EventName.RESUMED, self._stage or "denoise", {"step": step, "total": total})

    def emit(self, event: EventName, stage: str, data: JsonObject | None = None) -> None:
        """Tell what happened."""
        self._on_event(HostEvent(event, stage, data or {}))
