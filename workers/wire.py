"""What two halves of a host say to each other when they live in two processes, over one socket.

    asking half ── the start · Submit · Interrupt · Close ──► serving half (`serve`), around a DeviceHost
    asking half ◄── StartFailed | Ready · Told · Ended · State ── serving half

Messages are pickled, which is safe between a process and the child that it started itself over a socket in a folder of
its own. Files never travel: an order names folders that both halves see.
"""

import os
import pickle
import resource
import select
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from omnirt_tasks.contract import ErrorInfo, EventName
from workers.backends.cpu import process_peak_bytes
from workers.host import (
    DeviceCapability,
    DeviceHost,
    HostConfig,
    HostEvent,
    HostHealth,
    InterruptReason,
    RunOrder,
    RunOutcome,
)

OUTBOX_MESSAGES_MAX = 8_192
BEAT_S = 1.0
CLOSED_WITHIN_S = 5.0
UNFIT_WITHIN_S = 5.0
# On Linux a socket counts as writable while three quarters of its buffer are free; elsewhere while a little is.
SENT_AT_ONCE_SHARE = 8 if sys.platform == "linux" else None
# What may be missed when the other half does not read: it is told again, or was only to be looked at.
DROPPABLE = frozenset({EventName.PREVIEW, EventName.STAGE_PROGRESS})


@dataclass(frozen=True)
class ChildStart:
    """What the device's child is told first."""

    config: HostConfig
    log_level: str
    log_json: bool


@dataclass(frozen=True)
class Submit:
    """Run the order; `key` is the asking half's name for the run, since a job may run twice at once."""

    key: int
    order: RunOrder


@dataclass(frozen=True)
class Interrupt:
    """Stop the job's runs at their next device call."""

    job_id: str
    reason: InterruptReason


@dataclass(frozen=True)
class Close:
    """Give back what runs, waiting for it at most `timeout_s`, and end."""

    timeout_s: float


@dataclass(frozen=True)
class StartFailed:
    """There will be no Ready. `configuration` tells that another try would fail alike."""

    error: ErrorInfo
    configuration: bool


@dataclass(frozen=True)
class Ready:
    """Orders are taken from now on."""

    pid: int
    capability: DeviceCapability


@dataclass(frozen=True)
class Told:
    """An event of the run."""

    key: int
    event: HostEvent


@dataclass(frozen=True)
class Ended:
    """What became of the run."""

    key: int
    outcome: RunOutcome


@dataclass(frozen=True)
class State:
    """How the serving half stands: after each run, and each second. `memory_bytes` is its process's resident memory."""

    capability: DeviceCapability
    health: HostHealth
    memory_bytes: int


Message = Submit | Interrupt | Close | StartFailed | Ready | Told | Ended | State


class Outbox:
    """Sends messages in order without ever blocking on the other half. Owns the sending side of the connection.

    What surely fits into the socket is sent by whoever puts it: one thread more that wants the interpreter's lock for
    every event costs a busy device two per cent of its time. The rest waits for a thread of the outbox's own. Bounded:
    when the other half does not read, the oldest progress and previews go first.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._writable = select.poll()
        self._writable.register(connection.fileno(), select.POLLOUT)
        self._at_once_bytes_max = _buffer_bytes(connection) // SENT_AT_ONCE_SHARE if SENT_AT_ONCE_SHARE else 0
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Packed] = deque()
        self._sending = False  # by the thread, outside the lock
        self._closed = False
        self._thread = threading.Thread(target=self._send, name=name, daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Send the message, now or soon; once the other half is gone, forget it."""
        droppable = isinstance(message, State) or (isinstance(message, Told) and message.event.event in DROPPABLE)
        packed = _Packed(pickle.dumps(message), droppable)
        with self._changed:
            if self._closed:
                return
            if not (self._waiting or self._sending) and self._fits(packed):
                self._write(packed)
                return
            if len(self._waiting) >= OUTBOX_MESSAGES_MAX:
                self._drop_one()
            self._waiting.append(packed)
            self._changed.notify()

    def close(self, timeout_s: float = CLOSED_WITHIN_S) -> None:
        """Take no more; what waits is sent, if the other half reads it within `timeout_s`. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _fits(self, packed: "_Packed") -> bool:
        return len(packed.data) <= self._at_once_bytes_max and bool(self._writable.poll(0))

    def _drop_one(self) -> None:
        for place, packed in enumerate(self._waiting):
            if packed.droppable:
                del self._waiting[place]
                return
        self._waiting.popleft()

    def _send(self) -> None:
        while True:
            with self._changed:
                self._sending = False
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                packed = self._waiting.popleft()
                self._sending = True
            if not self._write(packed):
                with self._changed:
                    self._closed = True
                    self._waiting.clear()
                return

    def _write(self, packed: "_Packed") -> bool:
        try:
            self._connection.send_bytes(packed.data)
        except (OSError, ValueError):  # the other half is gone, which its reader learns by itself
            return False
        return True


def _buffer_bytes(connection: Connection) -> int:
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@dataclass(frozen=True)
class _Packed:
    """A message as it travels; `droppable` if it may be missed."""

    data: bytes
    droppable: bool


def receive(connection: Connection) -> object:
    """The next message, waited for. Raises EOFError once the other half is gone, however it went."""
    try:
        message: object = connection.recv()
    except (OSError, pickle.UnpicklingError) as error:  # it died in the middle of a message
        raise EOFError from error
    return message


def connect(address: str) -> Connection:
    """The connection to the half that listens at this address. Raises OSError when it is gone."""
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(address)
        return Connection(end.detach())


def serve(host: DeviceHost, connection: Connection, *, pid: int) -> None:
    """Serve the host until the asking half says Close or is gone, or the host can run no more. It is closed by then."""
    outbox = Outbox(connection, "wire-outbox")
    outbox.put(Ready(pid, host.capability()))
    timeout_s: float | None = None
    beat_at_s = time.monotonic() + BEAT_S
    try:
        while timeout_s is None:
            left_s = beat_at_s - time.monotonic()
            if left_s <= 0 or not connection.poll(left_s):
                outbox.put(_state(host))
                timeout_s = None if host.health().ok else UNFIT_WITHIN_S
                beat_at_s = time.monotonic() + BEAT_S
                continue
            match receive(connection):
                case Submit(key, order):
                    _submit(host, outbox, key, order)
                case Interrupt(job_id, reason):
                    host.interrupt(job_id, reason)
                case Close(within_s):
                    timeout_s = within_s
    except (EOFError, OSError):
        timeout_s = 0.0
    host.close(timeout_s)
    outbox.close()  # once all is told


def _submit(host: DeviceHost, outbox: Outbox, key: int, order: RunOrder) -> None:
    future = host.submit(order, lambda event: outbox.put(Told(key, event)))

    def ended(_: object) -> None:
        try:
            outbox.put(_state(host))  # first, so that whoever sees the end sees what it left
        finally:
            outbox.put(Ended(key, future.result()))

    future.add_done_callback(ended)


def _state(host: DeviceHost) -> State:
    return State(host.capability(), host.health(), process_memory_bytes())


def process_memory_bytes() -> int:
    """The resident memory of this process; its peak, where the system does not tell the present."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        return process_peak_bytes()
    return pages * resource.getpagesize()
