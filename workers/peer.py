"""PeerHost: a DeviceHost that lives in another process, for as long as that process does.

PeerHost ══ socket (`wire`) ══► the process, under a guard; it ends with this one, however this one ends
   │
   └─ once the process is gone, however it went: every run of it is RunLost, and `on_gone` is told
"""

import itertools
import logging
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.contract import ErrorInfo
from workers.host import (
    DeviceCapability,
    HostEvent,
    HostHealth,
    InterruptReason,
    OnEvent,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
)
from workers.wire import Close, Ended, Interrupt, Outbox, Ready, StartFailed, State, Submit, Told, receive

logger = logging.getLogger(__name__)

GRACE_S = 2.0
ACCEPT_POLL_S = 0.05
SILENT_AFTER_S = 5.0  # it tells how it stands each second
GONE_WITHIN_S = 1.0  # between the end of the socket and the end of the process
LINES_TOLD = 8


@dataclass(frozen=True)
class Gone:
    """How a peer's process ended: `ready` if it ever took orders, `asked` if this side wanted the end.

    `error` is what kept it from starting, where it could say so; `configuration` that another try would fail alike.
    """

    detail: str
    ready: bool
    asked: bool
    error: ErrorInfo | None = None
    configuration: bool = False


@dataclass(frozen=True)
class _Run:
    order: RunOrder
    on_event: OnEvent
    outcome: "Future[RunOutcome]"


class PeerHost:
    """One process that serves a DeviceHost, from its start to its end. Safe to share between threads.

    `command` gets the address to `connect` to as its last argument; `start` is the first thing that it is sent.
    `on_ready`, `on_state` and `on_gone` are called from the peer's own thread, the last exactly once. Each line of its
    output goes to `on_line`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        start: object,
        *,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None],
        on_ready: Callable[[], object] = lambda: None,
        on_state: Callable[[State], object] = lambda _: None,
        on_gone: Callable[[Gone], object] = lambda _: None,
    ) -> None:
        """Start the process. Raises OSError when none can be made."""
        self._name = name
        self._on_ready = on_ready
        self._on_state = on_state
        self._on_gone = on_gone
        self._lock = threading.Lock()  # guards what follows
        self._runs: dict[int, _Run] = {}
        self._keys = itertools.count()
        self._outbox: Outbox | None = None
        self._pid: int | None = None
        self._capability: DeviceCapability | None = None
        self._health = HostHealth(ok=False, detail="starting")
        self._heard_s = time.monotonic()
        self._failure: StartFailed | None = None
        self._why: str | None = None
        self._gone = threading.Event()
        # Not in a folder of the caller's: the address of a socket has a hundred characters at most.
        self._folder = Path(tempfile.mkdtemp(prefix="omnirt-peer-"))
        try:
            self._listener = socket.socket(socket.AF_UNIX)
            address = str(self._folder / "socket")
            self._listener.bind(address)
            self._listener.listen(1)
            self._listener.settimeout(ACCEPT_POLL_S)
            self._process = ChildProcess(name, [*command, address], env=env, grace_s=GRACE_S, on_line=on_line)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._thread = threading.Thread(target=self._attend, args=(start,), name=f"{name}-peer", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process that serves, once it is ready."""
        return self._pid

    @property
    def gone(self) -> bool:
        """Whether the process has ended, and its runs were told."""
        return self._gone.is_set()

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        outcome: Future[RunOutcome] = Future()
        outcome.set_running_or_notify_cancel()  # a run is stopped by `interrupt`, not through its future
        with self._lock:
            outbox = self._outbox
            if outbox is not None and not self.gone:
                key = next(self._keys)
                self._runs[key] = _Run(order, on_event, outcome)
                outbox.put(Submit(key, order))
                return outcome
        outcome.set_result(RunLost(f"The process {self._name} is not there."))
        return outcome

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        with self._lock:
            known = any(run.order.job_id == job_id for run in self._runs.values())
            if known and self._outbox is not None:
                self._outbox.put(Interrupt(job_id, reason))
        return known

    def end_by_force(self, why: str) -> bool:
        self._why = self._why or why  # no lock: this must reach a process that hears nothing, whoever waits for it
        self._process.kill()
        return True

    def capability(self) -> DeviceCapability:
        """As it was told last. Raises RuntimeError before the process was ready."""
        capability = self._capability
        if capability is None:
            raise RuntimeError(f"The process {self._name} has not told yet what it can do.")
        return capability

    def health(self) -> HostHealth:
        """As it was told last; a process that tells nothing hangs, as far as anybody can see from here."""
        silent_for_s = time.monotonic() - self._heard_s
        if self._outbox is None or silent_for_s < SILENT_AFTER_S:
            return self._health
        detail = f"the process {self._name} has told nothing for {silent_for_s:.0f} s"
        return HostHealth(ok=False, detail=detail, stuck_for_s=silent_for_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Have it give back what runs, and end; past `timeout_s` it is ended by force. Idempotent."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._why = self._why or "closed"
            outbox = self._outbox
        if outbox is not None:
            outbox.put(Close(timeout_s))
        else:
            self._process.ask_to_stop()
        if not self._gone.wait(max(deadline_s - time.monotonic(), 0.0) + GRACE_S):
            logger.warning("The process %s did not end when asked; it is ended by force.", self._name)
            self._process.kill()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The peer's thread

    def _attend(self, start: object) -> None:
        connection: Connection | None = None
        try:
            connection = self._accept()
            if connection is not None:
                self._converse(connection, start)
        except EOFError:
            pass  # how it ended is told below
        except Exception:
            logger.exception("The process %s cannot be spoken to.", self._name)
        finally:
            self._end(connection)

    def _accept(self) -> Connection | None:
        with self._listener:
            while not self._process.wait(0):
                try:
                    end, _ = self._listener.accept()
                except TimeoutError:
                    continue
                shutil.rmtree(self._folder, ignore_errors=True)  # nobody else is to come
                end.setblocking(True)
                return Connection(end.detach())
        return None

    def _converse(self, connection: Connection, start: object) -> None:
        outbox = Outbox(connection, f"{self._name}-outbox")
        outbox.put(start)
        try:
            while True:
                message = receive(connection)
                self._heard_s = time.monotonic()
                self._take(message, outbox)
        finally:
            outbox.close(0.0)

    def _take(self, message: object, outbox: Outbox) -> None:
        match message:
            case Told(key, event):
                if (run := self._runs.get(key)) is not None:
                    self._tell(key, run, event)
            case Ended(key, outcome):
                with self._lock:
                    ended = self._runs.pop(key, None)
                if ended is not None:
                    ended.outcome.set_result(outcome)
            case State(capability, health):
                self._capability, self._health = capability, health
                self._on_state(message)
            case Ready(pid, capability):
                with self._lock:
                    self._pid, self._capability, self._outbox = pid, capability, outbox
                    self._health = HostHealth(ok=True)
                self._on_ready()
            case StartFailed():
                self._failure = message

    def _tell(self, key: int, run: _Run, event: HostEvent) -> None:
        try:
            run.on_event(event)
        except Exception:
            logger.exception("A watcher of job %s failed.", run.order.job_id)
            self.interrupt(run.order.job_id, InterruptReason.GIVE_BACK)
            with self._lock:
                self._runs.pop(key, None)
            run.outcome.set_result(RunLost("Its watcher failed."))

    def _end(self, connection: Connection | None) -> None:
        if not self._process.wait(GONE_WITHIN_S):
            self._process.kill()
        self._process.stop()
        if connection is not None:
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        detail = self._how_it_ended()
        with self._lock:
            runs, self._runs = list(self._runs.values()), {}
            self._outbox = None
            self._health = HostHealth(ok=False, detail=detail)
            self._gone.set()
            asked = self._why == "closed"
        failure = self._failure
        gone = Gone(
            detail,
            ready=self._pid is not None,
            asked=asked,
            error=None if failure is None else failure.error,
            configuration=failure is not None and failure.configuration,
        )
        try:
            self._on_gone(gone)
        except Exception:  # whoever waits for a run is told all the same
            logger.exception("Who was to hear of the end of the process %s failed.", self._name)
        for run in runs:
            run.outcome.set_result(RunInterrupted(InterruptReason.GIVE_BACK) if asked else RunLost(detail))

    def _how_it_ended(self) -> str:
        if self._failure is not None:
            error = self._failure.error
            return f"{error.message} {error.hint or ''}".rstrip()
        if self._why is not None:
            return f"The process {self._name} was ended: {self._why}"
        code = self._process.exit_code or 0
        how = f"by signal {code - 128}" if code > 128 else f"with exit status {code}"
        last = " | ".join(line for line in list(self._process.last_lines)[-LINES_TOLD:] if line.strip())
        return f"The process {self._name} ended {how}." + (f" Its last lines: {last}" if last else "")
