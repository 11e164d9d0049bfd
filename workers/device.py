"""The device thread: the only caller of heavy modules, in the order in which calls come.

    job's thread ──DeviceCall──► one queue ──► device thread ──Future──► job's thread

It knows nothing of jobs, models or torch. A call carries its module and arguments, so that calls which agree can
become one forward pass here.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from workers.backends import BackendDriver

log = logging.getLogger(__name__)


class DeviceClosed(RuntimeError):
    """The device has been let go; the call was not made, or its end is not waited for."""


@dataclass(frozen=True, eq=False)
class DeviceCall:
    """One call of a heavy module: `function(*args, **kwargs)`, a method of `module`."""

    module: object
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Make the call, in the thread at hand."""
        return self.function(*self.args, **self.kwargs)


class DeviceThread:
    """One thread that makes every device call, under the backend's guard.

    Owns the queue of calls and the call in hand. Safe to share between threads.
    """

    def __init__(self, driver: BackendDriver, name: str = "omnirt-device") -> None:
        """Start the thread and wait until it holds the device; raises what the backend's guard raises."""
        self._driver = driver
        self._calls: queue.SimpleQueue[tuple[DeviceCall, Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards: no call is queued behind the end mark
        self._in_hand: Future[Any] | None = None
        self._in_hand_since: float | None = None
        self.closing = threading.Event()
        """Set once the device is to be let go; a call that waits for something else waits for this too."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=name, daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, call: DeviceCall) -> "Future[Any]":
        """Queue a call. Its future may be cancelled until the call begins. Raises DeviceClosed after `close`."""
        future: Future[Any] = Future()
        with self._lock:
            if self.closing.is_set():
                raise DeviceClosed("The device has been let go.")
            self._calls.put((call, future))
        return future

    def hold(self) -> "Hold":
        """Ask for the device for longer than a call; see Hold. Raises DeviceClosed after `close`."""
        return Hold(self)

    @property
    def alive(self) -> bool:
        """Whether calls are taken."""
        return self._thread.is_alive() and not self.closing.is_set()

    @property
    def ident(self) -> int | None:
        """The thread's identifier."""
        return self._thread.ident

    def busy_for_s(self) -> float | None:
        """How long the call in hand has lasted; None without one, and while a job holds the device: that is no call."""
        since = self._in_hand_since
        return None if since is None else time.monotonic() - since

    def close(self, timeout_s: float = 10.0) -> bool:
        """Take no more calls, end the thread, and say whether it ended within `timeout_s`.

        Calls that wait fail with DeviceClosed. So does the call in hand if it outlasts the time: its job goes on
        without it, and only the thread, which nothing can end, stays behind.
        """
        with self._lock:
            if not self.closing.is_set():
                self.closing.set()
                self._calls.put(None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        if (in_hand := self._in_hand) is not None:
            with suppress(InvalidStateError):  # it ended just now, after all
                in_hand.set_exception(DeviceClosed("The device was let go while the call ran."))
        self._refuse_waiting()
        log.error("a device call never returned; its thread is left behind", extra={"thread_name": self._thread.name})
        return False

    def _run(self, ready: "Future[None]") -> None:
        try:
            with self._driver.guard():
                ready.set_result(None)
                self._serve()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    def _serve(self) -> None:
        while (entry := self._calls.get()) is not None:
            call, future = entry
            if self.closing.is_set():
                if future.set_running_or_notify_cancel():
                    future.set_exception(DeviceClosed("The device has been let go."))
            elif future.set_running_or_notify_cancel():
                self._make(call, future)
            del entry, call, future  # tensors must not live until the next call comes

    def _make(self, call: DeviceCall, future: "Future[Any]") -> None:
        self._in_hand = future
        self._in_hand_since = None if isinstance(call.module, Hold) else time.monotonic()
        try:
            result = call()
            self._driver.synchronize()
        except BaseException as error:  # noqa: BLE001 - it belongs to the job that made the call
            with suppress(InvalidStateError):  # closed meanwhile
                future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                future.set_result(result)
        finally:
            self._in_hand = self._in_hand_since = None

    def _refuse_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                entry = self._calls.get_nowait()
                if entry is not None and entry[1].set_running_or_notify_cancel():
                    entry[1].set_exception(DeviceClosed("The device has been let go."))
        self._calls.put(None)  # for the thread, should its call ever return


class Hold:
    """The device for one job: no other call is made between the hold's turn and its `release`.

    It waits in the line of calls like any of them. For models that run elsewhere (processes of their own), or that
    change what others share.
    """

    def __init__(self, device: DeviceThread) -> None:
        self._released = threading.Event()
        self._mine: Future[None] = Future()
        self._queued = device.submit(DeviceCall(self, self._wait, (device.closing,)))
        self._queued.add_done_callback(self._end)

    @property
    def mine(self) -> "Future[None]":
        """Done once the device is held; cancelled when it never will be."""
        return self._mine

    def release(self) -> None:
        """Let the next call begin, or leave the line. Idempotent."""
        self._released.set()
        self._queued.cancel()

    def _wait(self, closing: threading.Event) -> None:
        self._mine.set_result(None)
        while not self._released.wait(0.1):
            if closing.is_set():
                return

    def _end(self, _queued: "Future[Any]") -> None:
        self._mine.cancel()
