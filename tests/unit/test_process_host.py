"""How a ProcessHost keeps its child, with a peer that does what it is told and no process."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from tests.support.waiting import eventually
from workers import process_host
from workers.host import (
    DeviceCapability,
    HostConfig,
    HostEvent,
    HostHealth,
    InterruptReason,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
)
from workers.peer import Gone
from workers.process_host import ProcessHost, Recycling
from workers.wire import State

STUB = HostConfig("cpu-stub", "cpu-stub:0", ("stub",), {}, cache_size=2, concurrency=8)
LOADED = DeviceCapability("cpu-stub", "cpu-stub:0", "fake", None, (), ("stub",), ("stub",), 8)
DONE = RunInterrupted(InterruptReason.CANCEL)
NEVER = Recycling()
FIT = HostHealth(ok=True)


class FakePeer:
    """A child as ProcessHost sees it, which lives as the test says."""

    def __init__(self, *_: object, on_ready: Any, on_state: Any, on_gone: Any, **__: object) -> None:
        self.on_ready, self.on_state, self.on_gone = on_ready, on_state, on_gone
        self.runs: list[tuple[RunOrder, Future[RunOutcome]]] = []
        self.closed = threading.Event()
        self.gone = False
        self.pid = 7

    def submit(self, order: RunOrder, on_event: Callable[[HostEvent], None]) -> "Future[RunOutcome]":
        self.runs.append((order, Future()))
        return self.runs[-1][1]

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        return any(order.job_id == job_id for order, _ in self.runs)

    def end_by_force(self, why: str) -> bool:
        return True

    def capability(self) -> DeviceCapability:
        return LOADED

    def health(self) -> HostHealth:
        return HostHealth(ok=True)

    def close(self, timeout_s: float = 10.0) -> None:
        self.closed.set()
        if not self.gone:
            self.end(asked=True)

    def end(self, *, ready: bool = True, asked: bool = False) -> None:
        self.gone = True
        self.on_gone(Gone("it ended", ready=ready, asked=asked))


class Kept:
    """A ProcessHost whose children are fakes, and what it told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peers: list[FakePeer] = []
        self.available: list[bool] = []
        self.on_available: Callable[[bool], object] = self.available.append
        monkeypatch.setattr(process_host, "PeerHost", self._start)
        monkeypatch.setattr(process_host, "BACKOFF_FIRST_S", 0.01)

    def _start(self, *arguments: Any, **options: Any) -> FakePeer:
        self.peers.append(FakePeer(*arguments, **options))
        return self.peers[-1]

    def host(self, recycling: Recycling = NEVER) -> ProcessHost:
        self.kept = ProcessHost(STUB, recycling=recycling, on_line=print, on_available=self._tell)
        return self.kept

    def _tell(self, available: bool) -> None:
        self.on_available(available)

    def peer(self, number: int = 1) -> FakePeer:
        eventually(lambda: len(self.peers) >= number and cast("object", self.kept._peer) is self.peers[number - 1])
        return self.peers[number - 1]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    kept = Kept(monkeypatch)
    yield kept
    kept.kept.close(1.0)


def order(job_id: str = "job") -> RunOrder:
    request = ResolvedRequest(task=Task.TEXT2IMAGE, model="stub", backend="cpu-stub", inputs=Inputs(), config={})
    return RunOrder(job_id, 1, request, Path())


def state(memory_bytes: int, health: HostHealth = FIT) -> State:
    return State(LOADED, health, memory_bytes)


def test_a_child_that_was_above_its_mark_is_replaced_though_its_memory_falls_again(kept: Kept) -> None:
    host = kept.host(Recycling(above_bytes=100))
    peer = kept.peer()
    peer.on_ready()
    for job_id in ("a", "b"):
        host.submit(order(job_id), print)
    peer.on_state(state(101))
    peer.runs[0][1].set_result(DONE)
    peer.on_state(state(99))
    peer.runs[1][1].set_result(DONE)
    kept.peer(2).on_ready()
    assert peer.closed.is_set()
    assert kept.available == [True, False, True]


def test_no_order_reaches_a_child_whose_device_is_lost_and_dies_with_it(kept: Kept) -> None:
    host = kept.host()
    peer = kept.peer()
    peer.on_ready()
    peer.on_state(state(1, HostHealth(ok=False, detail="the device is lost")))
    peer.on_state(state(1, HostHealth(ok=False, detail="the device is lost")))

    late = host.submit(order(), print)

    assert host.health() == HostHealth(ok=False, detail="the device is lost")
    peer.end()
    assert not late.done(), "it has no part in that"
    kept.peer(2).on_ready()
    kept.peers[1].runs[0][1].set_result(DONE)
    assert late.result(1) == DONE
    assert kept.available == [True, False, True]


def test_no_order_reaches_a_child_that_is_to_be_replaced(kept: Kept) -> None:
    host = kept.host(Recycling(after_jobs=1))
    peer = kept.peer()
    peer.on_ready()
    for job_id in ("a", "b"):
        host.submit(order(job_id), print)
    peer.runs[0][1].set_result(DONE)
    host.submit(order("late"), print)
    assert [run.job_id for run, _ in peer.runs] == ["a", "b"]
    peer.runs[1][1].set_result(DONE)
    second = kept.peer(2)
    second.on_ready()
    assert [run.job_id for run, _ in second.runs] == ["late"]


def test_what_a_dead_child_ended_does_not_count_for_the_next(kept: Kept) -> None:
    host = kept.host(Recycling(after_jobs=1))
    peer = kept.peer()
    peer.on_ready()
    host.submit(order(), print)
    peer.end()
    second = kept.peer(2)
    second.on_ready()
    peer.runs[0][1].set_result(RunLost("it ended"))
    assert host.health().ok
    assert not second.closed.is_set()


def test_a_dead_child_has_nothing_loaded(kept: Kept) -> None:
    host = kept.host()
    kept.peer().on_ready()
    assert host.capability().loaded == ("stub",)
    kept.peer().end()
    assert host.capability().loaded == ()


def test_a_start_that_succeeds_makes_the_next_one_quick_again(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    def at_once(failures: int) -> float:
        waited.append(failures)
        return 0.0

    monkeypatch.setattr(process_host, "backoff_s", at_once)
    kept.host()
    kept.peer().end(ready=False)
    kept.peer(2).end(ready=False)
    kept.peer(3).on_ready()
    kept.peer(3).end()
    kept.peer(4)
    assert waited == [0, 1, 2, 0]


def test_a_host_that_is_closed_while_its_child_is_made_ends_that_child(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly(*arguments: Any, **options: Any) -> FakePeer:
        begun.set()
        go.wait(10)
        return kept._start(*arguments, **options)

    monkeypatch.setattr(process_host, "PeerHost", slowly)
    host = kept.host()
    begun.wait(10)
    closing = threading.Thread(target=host.close, args=(1.0,))
    closing.start()
    eventually(host._closed.is_set)
    go.set()
    closing.join(10)
    assert not closing.is_alive()
    assert kept.peers[0].closed.is_set()


def test_an_interrupt_finds_a_waiting_order_while_the_child_becomes_ready(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = kept.host()
    answers: list[bool] = []
    known = FakePeer.submit

    def submit(peer: FakePeer, *arguments: Any) -> Any:
        canceller = threading.Thread(target=lambda: answers.append(host.interrupt("job", InterruptReason.CANCEL)))
        canceller.start()
        canceller.join(0.2)  # it waits for the lock, or finds nothing
        return known(peer, *arguments)

    monkeypatch.setattr(FakePeer, "submit", submit)
    host.submit(order(), print)
    kept.peer().on_ready()
    eventually(lambda: answers)
    assert answers == [True]


def test_a_second_run_that_must_be_ended_by_force_finds_it_done(kept: Kept) -> None:
    host = kept.host()
    peer = kept.peer()
    peer.on_ready()
    said: list[bool] = []

    def force(available: bool) -> None:
        if not available:
            said.append(host.end_by_force("it does not stop"))

    kept.on_available = force
    peer.end()
    assert said == [True], "no worker ends because its child has just ended"


def test_a_host_that_is_short_of_threads_tries_again(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[None] = []

    def none_left(*arguments: Any, **options: Any) -> FakePeer:
        tries.append(None)
        if len(tries) == 1:
            raise RuntimeError("can't start new thread")
        return kept._start(*arguments, **options)

    monkeypatch.setattr(process_host, "PeerHost", none_left)
    kept.host()
    kept.peer().on_ready()
    assert kept.available == [True]
