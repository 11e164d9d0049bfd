"""A PeerHost and its process, where it is neither a device's child nor a rank group."""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from workers.peer import Gone, PeerHost

NEVER_COMES = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_process_that_never_became_ready_is_ended_at_once_and_leaves_no_folder(folders: Path) -> None:
    gone: list[Gone] = []
    peer = PeerHost("p", NEVER_COMES, None, on_line=print, on_gone=gone.append)
    assert list(folders.iterdir()) != []
    began_s = time.monotonic()
    peer.close(20.0)
    assert time.monotonic() - began_s < 5.0, "it was asked, and not waited for"
    assert [(told.ready, told.asked) for told in gone] == [(False, True)]
    assert list(folders.iterdir()) == []


def test_a_group_that_has_ended_is_not_killed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from omnirt_tasks.child_process import ChildProcess

    child = ChildProcess("x", ["true"])
    assert child.wait(10)
    killed: list[object] = []
    monkeypatch.setattr(os, "killpg", lambda *told: killed.append(told))
    child.kill()
    assert killed == [], "its number may be another's by now"
    child.stop()


def test_a_host_that_is_unfit_while_orders_keep_coming_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from multiprocessing import Pipe

    from tests.unit.test_wire import FakeHost, order
    from workers import wire

    monkeypatch.setattr(wire, "BEAT_S", 0.1)
    host, (here, there) = FakeHost(), Pipe()
    thread = threading.Thread(target=wire.serve, args=(host, there), kwargs={"pid": 7})
    thread.start()
    host.fit = False
    for number in range(200):
        if host.closed_within_s is not None:
            break
        here.send(wire.Submit(number, order(str(number))))
        time.sleep(0.02)
    assert host.closed_within_s == wire.UNFIT_WITHIN_S
    here.close()
    thread.join(10)
    there.close()


def test_what_waits_in_an_outbox_that_closes_is_sent() -> None:
    from multiprocessing import Pipe

    from workers.host import InterruptReason, RunInterrupted
    from workers.wire import Ended, Outbox, receive

    here, there = Pipe()
    outbox = Outbox(there, "test-outbox")
    outbox.put("x" * 10_000_000)
    outbox.put(Ended(1, RunInterrupted(InterruptReason.CANCEL)))
    closing = threading.Thread(target=outbox.close, args=(10.0,))
    closing.start()
    eventually(lambda: outbox._closed)
    receive(here)
    assert isinstance(receive(here), Ended)
    closing.join(10)
    here.close()
    there.close()
