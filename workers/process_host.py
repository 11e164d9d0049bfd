"""ProcessHost: the `process` placement of a DeviceHost; a child owns torch and the device, and may die.

submit(order) ─► the child of the day ─► Future[RunOutcome]
                    │ dies, hangs, is recycled
                    ▼
its runs are RunLost at once; a new child starts, later and louder the more starts have failed in a row
"""

import logging
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.settings import environment_without_settings
from workers.host import (
    DeviceCapability,
    HostConfig,
    HostHealth,
    InterruptReason,
    OnEvent,
    RunInterrupted,
    RunOrder,
    RunOutcome,
)
from workers.peer import Gone, PeerHost
from workers.wire import ChildStart, State

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "workers.device_child")
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
LOUD_AFTER_FAILURES = 3
START_PATIENCE_S = 900.0  # a warm-up may read a hundred gigabytes


def backoff_s(failures: int) -> float:
    """How long to wait before the next start after so many failed in a row: twice as long each time, to a bound."""
    return 0.0 if failures == 0 else min(BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 16), BACKOFF_MAX_S)


@dataclass(frozen=True)
class Recycling:
    """When a child is replaced, once it runs nothing: after so many jobs, or with more host memory; 0 is never."""

    after_jobs: int = 0
    above_bytes: int = 0

    def due(self, jobs: int, memory_bytes: int) -> bool:
        """Whether a child that ended `jobs` runs and holds so much memory is to go."""
        return 0 < self.after_jobs <= jobs or 0 < self.above_bytes < memory_bytes


@dataclass(frozen=True)
class _Waiting:
    """An order that came while no child took any."""

    order: RunOrder
    on_event: OnEvent
    outcome: "Future[RunOutcome]"


@dataclass(frozen=True)
class _Recycle:
    """The child is to be replaced, and runs nothing."""

    peer: PeerHost


class ProcessHost:
    """Keeps one child that serves the device, and starts another when it is gone. Safe to share between threads.

    `on_available` is told, from threads of the host, whether orders can begin at once. `on_unusable` is told once when
    no child can ever start with this configuration. Orders that come in between wait for the next child.
    """

    def __init__(
        self,
        config: HostConfig,
        *,
        log_level: str = "INFO",
        log_json: bool = False,
        recycling: Recycling = Recycling(),
        on_line: Callable[[str], None],
        on_available: Callable[[bool], object] = lambda _: None,
        on_unusable: Callable[[ErrorInfo], object] = lambda _: None,
    ) -> None:
        self._start = ChildStart(config, log_level, log_json)
        self._recycling = recycling
        self._on_line = on_line
        self._on_available = on_available
        self._on_unusable = on_unusable
        self._capability = DeviceCapability(
            backend=config.backend,
            device=config.device,
            device_name="",
            memory_bytes=None,
            dtypes=(),
            models=tuple(sorted(config.models)),
            loaded=(),
            concurrency=config.concurrency,
        )
        self._lock = threading.Lock()  # guards what follows
        self._peer: PeerHost | None = None
        self._available = False
        self._detail = "starting"
        self._memory_bytes = 0
        self._waiting: list[_Waiting] = []
        self._running = 0
        self._jobs = 0  # that the present child has ended
        self._due = False  # the present child is to be replaced, whatever its memory does from now on
        self._closed = threading.Event()
        self._news: queue.SimpleQueue[Gone | _Recycle] = queue.SimpleQueue()
        self._keeper = threading.Thread(target=self._keep, name="device-keeper", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int | None:
        """The child that serves now; None while there is none."""
        peer = self._peer
        return None if peer is None or peer.gone else peer.pid

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        outcome: Future[RunOutcome] = Future()
        outcome.set_running_or_notify_cancel()  # a run is stopped by `interrupt`, not through its future
        run = _Waiting(order, on_event, outcome)
        with self._lock:
            if self._closed.is_set():
                outcome.set_result(RunInterrupted(InterruptReason.GIVE_BACK))
                return outcome
            peer = self._peer if self._available else None
            if peer is None:
                self._waiting.append(run)
                return outcome
            self._running += 1
            future = peer.submit(order, on_event)
        self._follow(peer, run, future)
        return outcome

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        with self._lock:
            stopped = [run for run in self._waiting if run.order.job_id == job_id]
            self._waiting = [run for run in self._waiting if run.order.job_id != job_id]
            peer = self._peer
        for run in stopped:
            run.outcome.set_result(RunInterrupted(reason))
        return (peer is not None and peer.interrupt(job_id, reason)) or bool(stopped)

    def end_by_force(self, why: str) -> bool:
        if (peer := self._peer) is not None:
            peer.end_by_force(why)
        return True  # without a child nothing runs; what was lost with the last one is being told

    def capability(self) -> DeviceCapability:
        """As the child told it last; before the first child is ready, what was asked for."""
        return self._capability

    def health(self) -> HostHealth:
        peer = self._peer
        return peer.health() if self._available and peer is not None else HostHealth(ok=False, detail=self._detail)

    def close(self, timeout_s: float = 10.0) -> None:
        with self._lock:
            self._closed.set()
            waiting, self._waiting = self._waiting, []
            peer = self._peer
        for run in waiting:
            run.outcome.set_result(RunInterrupted(InterruptReason.GIVE_BACK))
        if peer is not None:
            peer.close(timeout_s)
        self._keeper.join()

    # Runs, in the threads of whoever submits, and of the child's peer

    def _follow(self, peer: PeerHost, run: _Waiting, future: "Future[RunOutcome]") -> None:
        def ended(_: object) -> None:
            self._count_ended(peer)
            run.outcome.set_result(future.result())

        future.add_done_callback(ended)

    def _count_ended(self, peer: PeerHost) -> None:
        with self._lock:
            if peer is not self._peer:
                return  # it is gone, and so is what was counted of it
            self._running -= 1
            self._jobs += 1
            self._due = self._due or self._recycling.due(self._jobs, self._memory_bytes)
            tell = self._due and self._available
            self._available = self._available and not self._due
            if self._due and not self._running:
                self._news.put(_Recycle(peer))
        if tell:
            self._on_available(False)

    # The child's life, told by its peer's thread

    def _ready(self, peer: PeerHost) -> None:
        with self._lock:
            self._capability = peer.capability()
            self._available, self._detail = True, ""
            self._running, self._jobs, self._due = len(self._waiting), 0, False
            waiting, self._waiting = self._waiting, []
            # Under the lock, so that no interrupt comes between: it finds the run here, or there.
            given = [(run, peer.submit(run.order, run.on_event)) for run in waiting]
        for run, future in given:
            self._follow(peer, run, future)
        self._on_available(True)

    def _note(self, state: State) -> None:
        with self._lock:
            self._capability, self._memory_bytes = state.capability, state.memory_bytes
            unfit = self._available and not state.health.ok
            if unfit:  # it is about to end: what comes now is to have no part in that
                self._available, self._detail = False, state.health.detail
        if unfit:
            self._on_available(False)

    def _note_gone(self, gone: Gone) -> None:
        with self._lock:
            tell = self._available
            self._peer, self._available, self._detail = None, False, gone.detail
            self._capability = replace(self._capability, loaded=())
        try:
            if tell:
                self._on_available(False)
        finally:
            self._news.put(gone)

    # The keeper's thread, which alone starts and replaces children

    def _keep(self) -> None:
        failures, served = 0, False
        while not self._closed.wait(backoff_s(failures)):
            try:
                peer = self._start_child()
                gone = self._see_off(peer)
            except (OSError, RuntimeError) as error:  # no process, no thread
                gone = Gone(f"No process can be made: {error}", ready=False, asked=False)
            if self._closed.is_set():
                return
            failures = 0 if gone.ready else failures + 1
            served = served or gone.ready
            if gone.configuration and gone.error is not None and not served:  # what served once was no mistake
                logger.critical("The device cannot be served: %s", gone.detail)
                self._on_unusable(gone.error)
                return
            self._tell_of(gone, failures)

    def _start_child(self) -> PeerHost:
        made: Future[PeerHost] = Future()  # the callbacks need what is made here
        peer = PeerHost(
            "device",
            COMMAND,
            self._start,
            env=environment_without_settings(),  # what runs models needs no password and no key
            on_line=self._on_line,
            on_ready=lambda: self._ready(made.result()),
            on_state=self._note,
            on_gone=self._note_gone,
        )
        with self._lock:
            self._peer = peer
            closed = self._closed.is_set()
        made.set_result(peer)
        if closed:
            peer.close(0.0)
        return peer

    def _see_off(self, peer: PeerHost) -> Gone:
        late = threading.Timer(START_PATIENCE_S, _give_up_start, (peer,))
        late.name, late.daemon = "device-start", True
        late.start()
        try:
            while isinstance(news := self._news.get(), _Recycle):
                if news.peer is peer:  # and not one that died before it could be replaced
                    logger.info("The device's process is replaced; it has done its share of work.")
                    peer.close()
        finally:
            late.cancel()
        return news

    def _tell_of(self, gone: Gone, failures: int) -> None:
        if gone.asked:
            return
        if gone.ready:
            logger.error("The device's process is gone; its jobs run again, and another starts. %s", gone.detail)
        elif failures < LOUD_AFTER_FAILURES:
            logger.error("The device's process did not start; it is tried again. %s", gone.detail)
        else:
            logger.critical(
                "The device's process did not start, %d times in a row now; next try in %.1f s. %s",
                failures,
                backoff_s(failures),
                gone.detail,
            )


def _give_up_start(peer: PeerHost) -> None:
    if peer.pid is None:
        peer.end_by_force(f"it was not ready within {START_PATIENCE_S:g} s")
