"""What two halves of a host say to each other, without a process between them."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from omnirt_tasks.contract import EventName, Inputs, ResolvedRequest, Task
from tests.support.waiting import eventually
from workers import wire
from workers.host import (
    DeviceCapability,
    HostEvent,
    HostHealth,
    InterruptReason,
    OnEvent,
    RunInterrupted,
    RunOrder,
    RunOutcome,
)
from workers.wire import Close, Ended, Interrupt, Outbox, Ready, State, Submit, Told, receive, serve

WITHIN_S = 10.0


class FakeHost:
    """Runs nothing; its only run ends when it is interrupted or closed."""

    def __init__(self) -> None:
        self.fit = True
        self.closed_within_s: float | None = None
        self.runs: list[tuple[RunOrder, OnEvent, Future[RunOutcome]]] = []

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        self.runs.append((order, on_event, Future()))
        on_event(HostEvent(EventName.STAGE_START, "load"))
        return self.runs[-1][2]

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        for order, _, outcome in self.runs:
            if order.job_id == job_id:
                outcome.set_result(RunInterrupted(reason))
        return True

    def end_by_force(self, why: str) -> bool:
        return False

    def capability(self) -> DeviceCapability:
        return DeviceCapability("cpu-stub", "cpu-stub:0", "fake", None, (), (), (), 1)

    def health(self) -> HostHealth:
        return HostHealth(ok=self.fit)

    def close(self, timeout_s: float = 10.0) -> None:
        self.closed_within_s = timeout_s
        for _, _, outcome in self.runs:
            if not outcome.done():
                outcome.set_result(RunInterrupted(InterruptReason.GIVE_BACK))


def order(job_id: str = "job") -> RunOrder:
    request = ResolvedRequest(task=Task.TEXT2IMAGE, model="stub", backend="cpu-stub", inputs=Inputs(), config={})
    return RunOrder(job_id, 1, request, Path())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeHost, Connection, threading.Thread]]:
    monkeypatch.setattr(wire, "BEAT_S", 0.01)
    host, (here, there) = FakeHost(), Pipe()
    thread = threading.Thread(target=serve, args=(host, there), kwargs={"pid": 7})
    thread.start()
    yield host, here, thread
    here.close()
    thread.join(WITHIN_S)
    there.close()


def until(connection: Connection, kind: type) -> list[object]:
    """Every message up to the first of this kind."""
    told: list[object] = []
    while not any(isinstance(message, kind) for message in told):
        told.append(receive(connection))
    return told


def test_a_run_is_told_from_its_first_event_to_its_end_under_the_key_it_was_given(
    served: tuple[FakeHost, Connection, threading.Thread],
) -> None:
    _, here, _ = served
    assert isinstance(until(here, Ready)[0], Ready)
    for message in (Submit(41, order("a")), Submit(42, order("b")), Interrupt("b", InterruptReason.CANCEL)):
        here.send(message)
    told = until(here, Ended)
    assert [message.key for message in told if isinstance(message, Told)] == [41, 42]
    assert told[-1] == Ended(42, RunInterrupted(InterruptReason.CANCEL))


def test_an_order_arrives_with_every_folder_and_file_that_it_names(
    served: tuple[FakeHost, Connection, threading.Thread], tmp_path: Path
) -> None:
    host, here, _ = served
    sent = replace(
        order(),
        files={"image": tmp_path / "image"},
        checkpoint_dir=tmp_path / "checkpoints",
        resume_from=tmp_path / "step-6.checkpoint",
    )
    here.send(Submit(1, sent))
    until(here, Told)
    assert [arrived for arrived, _, _ in host.runs] == [sent]


def test_a_close_gives_back_what_runs_and_all_is_told_before_the_end(
    served: tuple[FakeHost, Connection, threading.Thread],
) -> None:
    host, here, thread = served
    here.send(Submit(1, order()))
    here.send(Close(2.5))
    assert until(here, Ended)[-1] == Ended(1, RunInterrupted(InterruptReason.GIVE_BACK))
    thread.join(WITHIN_S)
    assert host.closed_within_s == 2.5


def test_a_host_that_can_run_no_more_ends_so_that_another_can_begin(
    served: tuple[FakeHost, Connection, threading.Thread],
) -> None:
    host, here, thread = served
    here.send(Submit(1, order()))
    until(here, Told)
    host.fit = False
    told = until(here, Ended)
    thread.join(WITHIN_S)
    assert not thread.is_alive()
    assert any(isinstance(message, State) and not message.health.ok for message in told), "and it says why"


def test_a_host_whose_other_half_is_gone_is_closed_at_once(
    served: tuple[FakeHost, Connection, threading.Thread],
) -> None:
    host, here, thread = served
    here.send(Submit(1, order()))
    until(here, Told)
    here.close()
    thread.join(WITHIN_S)
    assert host.closed_within_s == 0.0


def test_an_outbox_that_nobody_reads_forgets_progress_first_and_never_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "OUTBOX_MESSAGES_MAX", 8)
    here, there = Pipe()
    outbox = Outbox(there, "test-outbox")
    outbox.put("x" * 10_000_000)  # more than a socket holds: what follows waits
    eventually(lambda: not outbox._waiting)
    step = HostEvent(EventName.STAGE_PROGRESS, "denoise", {"step": 1, "total": 9})
    for key in range(50):
        outbox.put(Told(key, step))
        if key % 10 == 0:
            outbox.put(Ended(key, RunInterrupted(InterruptReason.CANCEL)))
    told: list[object] = []
    while Told(49, step) not in told:
        told.append(receive(here))
    outbox.close()
    ended = [message.key for message in told if isinstance(message, Ended)]
    assert ended == [0, 10, 20, 30, 40]
    assert len(told) < 20
    assert told[-1] == Told(49, step), "the newest is there"
    here.close()
    there.close()
