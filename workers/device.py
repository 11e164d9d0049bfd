"""The device thread: the only caller of heavy modules, in the order in which calls come, but for those made as one.

    job's thread ──DeviceCall──► line ──chunk──► device thread: forwards ──Future──► job's thread

It knows nothing of jobs, models or torch. Which calls become one is the line's to say (`workers.chunks.line`), how
they are made that of `workers.chunks.forwards`.
"""

import logging
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from workers.backends import BackendDriver
from workers.chunks.calls import DeviceCall
from workers.chunks.forwards import Forwards
from workers.chunks.limits import Limits, MeasuredLimits
from workers.chunks.line import Line, Waiting, WaitUntil
from workers.chunks.members import Member

log = logging.getLogger(__name__)


class DeviceClosed(RuntimeError):
    """The device has been let go; the call was not made, or its end is not waited for."""


class DeviceThread:
    """One thread that makes every device call, under the backend's guard: those of an equal key as one.

    Owns the line of calls and the calls in hand. Safe to share between threads.
    """

    def __init__(self, driver: BackendDriver, name: str = "omnirt-device", *, limits: Limits | None = None) -> None:
        """Start the thread and wait until it holds the device; raises what the backend's guard raises.

        `limits` say how many rows a call may have; by default as measured, from nothing.
        """
        self._driver = driver
        limits = MeasuredLimits() if limits is None else limits
        self._forwards = Forwards(driver, limits)
        self._changed = threading.Condition()  # guards what follows
        self._line = Line(limits)
        self._in_hand: tuple[Waiting, ...] = ()
        self.closing = threading.Event()
        """Set once the device is to be let go; a call that waits for something else waits for this too."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=name, daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, call: DeviceCall, member: Member | None = None, *, denoises: bool = False) -> "Future[Any]":
        """Put a call into the line. Its future may be cancelled until the call begins. Raises DeviceClosed when closed.

        A call of a run's `member` may be made as one with those of others. `denoises` says that the member is to come
        again, step by step: who shares with it waits for it a little, until it leaves.
        """
        waiting = Waiting(call, member, time.monotonic(), denoises)
        with self._changed:
            if self.closing.is_set():
                raise DeviceClosed("The device has been let go.")
            self._line.add(waiting)
            self._changed.notify()
        return waiting.future

    def leave(self, member: Member) -> None:
        """Let nobody wait for this member: it has no further call of the kind, or is to stop."""
        with self._changed:
            self._line.leave(member)
            self._changed.notify()

    def hold(self) -> "Hold":
        """Ask for the device for longer than a call; see Hold. Raises DeviceClosed after `close`."""
        with self._changed:  # nothing is to come between the look and the hold's call
            return Hold(self, waits=bool(self._in_hand) or not self._line.empty)

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
        since_s = self._forwards.since_s
        if since_s is None or any(isinstance(each.call.module, Hold) for each in self._in_hand):
            return None
        return time.monotonic() - since_s

    def close(self, timeout_s: float = 10.0) -> bool:
        """Take no more calls, end the thread, and say whether it ended within `timeout_s`.

        Calls that wait fail with DeviceClosed. So do those in hand if they outlast the time: their jobs go on
        without them, and only the thread, which nothing can end, stays behind.
        """
        with self._changed:
            self.closing.set()
            self._changed.notify()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        self._refuse_all()
        log.error("a device call never returned; its thread is left behind", extra={"thread_name": self._thread.name})
        return False

    def _run(self, ready: "Future[None]") -> None:
        try:
            with self._driver.guard():
                ready.set_result(None)
                try:
                    while calls := self._next():
                        self._make(calls)
                        del calls  # tensors must not live until the next call comes
                finally:  # whatever ends the thread, nobody is to wait for it
                    self.closing.set()
                    self._refuse_all()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    def _next(self) -> tuple[Waiting, ...]:
        """The calls to make, waited for; none once the device is to be let go."""
        with self._changed:
            while not self.closing.is_set():
                now_s = time.monotonic()
                match self._line.next(now_s):
                    case WaitUntil(time_s):
                        self._changed.wait(max(time_s - now_s, 0.0))
                    case None:
                        self._changed.wait()
                    case calls:
                        self._in_hand = calls
                        return calls
        return ()

    def _make(self, calls: tuple[Waiting, ...]) -> None:
        for made in self._forwards.make(calls):
            with self._changed:
                if made.error is None:
                    self._line.made(made.calls, made.elapsed_s, time.monotonic())
                self._in_hand = tuple(each for each in self._in_hand if each not in made.calls)
            made.settle()
            del made
            if self.closing.is_set():  # those that were not made with them are not made any more
                return

    def _refuse_all(self) -> None:
        """Fail what is in hand and what waits, but for what ends just now."""
        with self._changed:
            in_hand, self._in_hand = self._in_hand, ()
            waiting = [each for each in self._line.clear() if each.future.set_running_or_notify_cancel()]
        for each in (*in_hand, *waiting):
            with suppress(InvalidStateError):
                each.future.set_exception(DeviceClosed("The device has been let go."))


class Hold:
    """The device for one job: no other call is made between the hold's turn and its `release`.

    It waits in the line of calls like any of them. For models that run elsewhere (processes of their own), or that
    change what others share.
    """

    def __init__(self, device: DeviceThread, *, waits: bool) -> None:
        self.waits = waits
        """Whether others were before it when it came."""
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
        if self._mine.cancel():
            self._mine.set_running_or_notify_cancel()  # which alone wakes those that wait for it
