"""The device thread makes every call, one after another, and lets go of what it was given."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from tests.support.chunks import GivenLimits, TellingJoint, member
from tests.support.chunks import call as joint_call
from tests.support.waiting import eventually
from workers.backends.stub import StubDriver
from workers.chunks.calls import DeviceCall
from workers.chunks.members import Member
from workers.device import DeviceClosed, DeviceThread

TIMEOUT_S = 10.0


class GuardedDriver(StubDriver):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.guarded: list[int] = []
        self.synchronized: list[int] = []

    @contextmanager
    def guard(self) -> Iterator[None]:
        self.guarded.append(threading.get_ident())
        yield

    def synchronize(self) -> None:
        self.synchronized.append(threading.get_ident())


def call(function: Callable[..., Any], *args: Any) -> DeviceCall:
    return DeviceCall(module=None, function=function, args=args)


@pytest.fixture
def driver() -> GuardedDriver:
    return GuardedDriver()


@pytest.fixture
def device(driver: GuardedDriver) -> Iterator[DeviceThread]:
    thread = DeviceThread(driver)
    yield thread
    thread.close()


def test_every_call_is_made_in_one_thread_under_the_guard(device: DeviceThread, driver: GuardedDriver) -> None:
    futures = [device.submit(call(threading.get_ident)) for _ in range(20)]
    assert {future.result(TIMEOUT_S) for future in futures} == {device.ident}
    assert driver.guarded == [device.ident]
    assert driver.synchronized == [device.ident] * 20


def test_calls_are_made_in_the_order_in_which_they_came(device: DeviceThread) -> None:
    order: list[int] = []
    futures = [device.submit(call(order.append, number)) for number in range(50)]
    for future in futures:
        future.result(TIMEOUT_S)
    assert order == list(range(50))


def test_what_a_call_raises_reaches_its_caller_and_the_next_call_is_made(device: DeviceThread) -> None:
    def burst() -> None:
        raise SystemExit("a model's last words")

    with pytest.raises(SystemExit):
        device.submit(call(burst)).result(TIMEOUT_S)
    assert device.submit(call(lambda: 7)).result(TIMEOUT_S) == 7


def test_a_call_that_is_cancelled_before_it_begins_is_never_made(device: DeviceThread) -> None:
    release, made = threading.Event(), threading.Event()
    first = device.submit(call(release.wait, TIMEOUT_S))
    second = device.submit(call(made.set))
    assert second.cancel()
    release.set()
    first.result(TIMEOUT_S)
    device.submit(call(lambda: None)).result(TIMEOUT_S)
    assert not made.is_set()
    with pytest.raises(CancelledError):
        second.result(TIMEOUT_S)


def test_busy_tells_how_long_the_call_in_hand_has_lasted(device: DeviceThread) -> None:
    assert device.busy_for_s() is None
    release = threading.Event()
    future = device.submit(call(release.wait, TIMEOUT_S))
    eventually(lambda: (device.busy_for_s() or 0.0) > 0.02)
    release.set()
    future.result(TIMEOUT_S)
    eventually(lambda: device.busy_for_s() is None)


def test_a_hold_keeps_every_other_call_out_and_is_no_call_that_hangs(device: DeviceThread) -> None:
    first, second = device.hold(), device.hold()
    first.mine.result(TIMEOUT_S)
    waiting = device.submit(call(lambda: "made"))
    assert device.busy_for_s() is None, "what runs apart may take as long as it likes"
    with pytest.raises(TimeoutError):
        waiting.result(0.05)
    second.release()  # it leaves the line without its turn
    assert second.mine.cancelled()
    first.release()
    assert waiting.result(TIMEOUT_S) == "made"


def test_a_result_does_not_live_until_the_next_call(device: DeviceThread) -> None:
    class Tensor:
        pass

    given, future = Tensor(), None
    alive = weakref.ref(given)
    future = device.submit(call(lambda tensor: [tensor], given))
    future.result(TIMEOUT_S)
    del given, future
    eventually(lambda: gc.collect() is not None and alive() is None)


def test_after_closing_no_call_is_taken_and_those_that_wait_fail(driver: GuardedDriver) -> None:
    device = DeviceThread(driver)
    release = threading.Event()
    in_hand = device.submit(call(release.wait, TIMEOUT_S))
    waiting = device.submit(call(lambda: None))
    eventually(lambda: device.busy_for_s() is not None)
    closer = threading.Thread(target=device.close)
    closer.start()
    assert device.closing.wait(TIMEOUT_S)
    release.set()
    closer.join(TIMEOUT_S)
    assert in_hand.result(TIMEOUT_S) is True
    with pytest.raises(DeviceClosed):
        waiting.result(TIMEOUT_S)
    with pytest.raises(DeviceClosed):
        device.submit(call(lambda: None))
    assert not device.alive


def test_closing_does_not_wait_for_a_call_that_never_returns(driver: GuardedDriver) -> None:
    device = DeviceThread(driver)
    release = threading.Event()
    in_hand, waiting = device.submit(call(release.wait, TIMEOUT_S)), device.submit(call(lambda: None))
    eventually(lambda: device.busy_for_s() is not None)
    assert not device.close(timeout_s=0.05)
    for future in (in_hand, waiting):
        with pytest.raises(DeviceClosed):
            future.result(TIMEOUT_S)
    release.set()  # it returns after all: the thread ends, and the late result hurts nobody
    assert device.close(timeout_s=TIMEOUT_S)


def test_a_device_that_cannot_be_held_says_so_at_once() -> None:
    class Broken(StubDriver):
        def guard(self) -> AbstractContextManager[None]:
            raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        DeviceThread(Broken())


# Calls of several runs


class Meeting:
    """Calls of a module whose first one holds the device until the test lets it go, so that others come meanwhile."""

    def __init__(self, device: DeviceThread) -> None:
        self.joint = TellingJoint()
        self._device = device
        self._go = threading.Event()
        self._first = device.submit(call(self._go.wait, TIMEOUT_S))
        eventually(lambda: device.busy_for_s() is not None)

    def submit(self, number: int, who: Member, function: Callable[..., Any] = int) -> "Future[Any]":
        shared = joint_call("unet", function, number, joint=self.joint)
        return self._device.submit(shared, who, denoises=True)

    def begin(self) -> None:
        self._go.set()
        self._first.result(TIMEOUT_S)


@pytest.fixture
def sharing(driver: GuardedDriver) -> Iterator[DeviceThread]:
    """A device that is known to take many rows at once, each call of which is expected to last an hour."""
    thread = DeviceThread(driver, limits=GivenLimits(expected_s=3600.0))
    yield thread
    thread.close()


def test_calls_that_wait_for_the_device_are_made_as_one(sharing: DeviceThread) -> None:
    meeting = Meeting(sharing)
    futures = [meeting.submit(number, member()) for number in range(5)]
    meeting.begin()
    assert [future.result(TIMEOUT_S) for future in futures] == [0, 1, 2, 3, 4]
    assert meeting.joint.sizes == [5]


def test_a_call_that_is_cancelled_while_it_waits_leaves_the_chunk(sharing: DeviceThread) -> None:
    meeting = Meeting(sharing)
    futures = [meeting.submit(number, member()) for number in range(3)]
    assert futures[1].cancel()
    meeting.begin()
    assert [futures[0].result(TIMEOUT_S), futures[2].result(TIMEOUT_S)] == [0, 2]
    assert meeting.joint.sizes == [2]


def test_a_member_that_leaves_is_waited_for_no_more_from_that_moment_on(sharing: DeviceThread) -> None:
    meeting, stays, leaves = Meeting(sharing), member(), member()
    both = [meeting.submit(0, stays), meeting.submit(1, leaves)]
    meeting.begin()
    for future in both:
        future.result(TIMEOUT_S)
    waiting = meeting.submit(2, stays)
    with pytest.raises(TimeoutError):
        waiting.result(0.05)
    sharing.leave(leaves)
    assert waiting.result(TIMEOUT_S) == 2


def test_what_one_of_them_raises_is_its_own(sharing: DeviceThread) -> None:
    def burst(_: int) -> None:
        raise ValueError("one bad member")

    meeting = Meeting(sharing)
    futures = [meeting.submit(number, member(), burst if number == 1 else int) for number in range(3)]
    meeting.begin()
    assert [futures[0].result(TIMEOUT_S), futures[2].result(TIMEOUT_S)] == [0, 2]
    with pytest.raises(ValueError, match="one bad member"):
        futures[1].result(TIMEOUT_S)


def test_a_hold_keeps_shared_calls_out_and_says_whether_it_had_to_wait(sharing: DeviceThread) -> None:
    first = sharing.hold()
    assert not first.waits
    first.mine.result(TIMEOUT_S)
    second = sharing.hold()
    assert second.waits
    joint = TellingJoint()
    futures = [sharing.submit(joint_call("unet", int, number, joint=joint), member()) for number in range(2)]
    first.release()
    second.mine.result(TIMEOUT_S)
    assert not any(future.done() for future in futures)
    second.release()
    assert [future.result(TIMEOUT_S) for future in futures] == [0, 1]
    assert joint.sizes == [2]


def test_closing_while_members_are_waited_for_fails_what_waits(sharing: DeviceThread) -> None:
    meeting, stays, leaves = Meeting(sharing), member(), member()
    both = [meeting.submit(0, stays), meeting.submit(1, leaves)]
    meeting.begin()
    for future in both:
        future.result(TIMEOUT_S)
    waiting = meeting.submit(2, stays)
    assert sharing.close(TIMEOUT_S)
    with pytest.raises(DeviceClosed):
        waiting.result(TIMEOUT_S)


def test_the_rest_of_a_chunk_that_came_apart_is_not_made_once_the_device_is_to_be_let_go(
    sharing: DeviceThread,
) -> None:
    made: list[int] = []
    closers: list[threading.Thread] = []

    def burst(_: int) -> None:
        raise ValueError("so that each is made alone")

    def close(number: int) -> None:
        closers.append(threading.Thread(target=sharing.close))
        closers[0].start()
        sharing.closing.wait(TIMEOUT_S)
        made.append(number)

    meeting = Meeting(sharing)
    functions = [burst, close, made.append]
    futures = [meeting.submit(number, member(), function) for number, function in enumerate(functions)]
    meeting.begin()
    with pytest.raises(ValueError, match="each is made alone"):
        futures[0].result(TIMEOUT_S)
    futures[1].result(TIMEOUT_S)
    with pytest.raises(DeviceClosed):
        futures[2].result(TIMEOUT_S)
    closers[0].join(TIMEOUT_S)
    assert made == [1]


def test_a_shared_result_does_not_live_until_the_next_call(sharing: DeviceThread) -> None:
    class Tensor:
        pass

    alive: list[weakref.ref[Tensor]] = []

    def make(_: int) -> Tensor:
        made = Tensor()
        alive.append(weakref.ref(made))
        return made

    meeting = Meeting(sharing)
    futures = [meeting.submit(number, member(), make) for number in range(2)]
    meeting.begin()
    for future in futures:
        future.result(TIMEOUT_S)
    del futures, future
    eventually(lambda: gc.collect() is not None and not any(each() for each in alive))
    assert len(alive) == 2


def test_the_stub_runs_where_torch_cannot_be_imported() -> None:
    script = """
import sys, tempfile
from pathlib import Path
for name in ("torch", "diffusers", "transformers", "numpy"):
    sys.modules[name] = None
from tests.support.hosts import stub_bench
from workers.host import RunSucceeded
with tempfile.TemporaryDirectory() as folder:
    bench = stub_bench(Path(folder))
    outcome = bench.run(preview_every_steps=2)
    assert isinstance(outcome, RunSucceeded), outcome
    bench.host.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
