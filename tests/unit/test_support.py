"""The tests' own tools, where a fault of theirs would hide a fault of the project."""

import subprocess
import threading

import pytest

from omnirt_tasks.settings import Settings
from tests.support.leaks import Snapshot
from tests.support.processes import Processes, environment
from tests.support.waiting import eventually


def test_a_thread_and_a_process_that_stay_are_leaks_and_gone_they_are_none() -> None:
    before = Snapshot.take()
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="forgotten")
    thread.start()
    process = subprocess.Popen(["sleep", "60"])
    try:
        leaks = before.leaks(grace_s=0)
    finally:
        ended.set()
        process.kill()
        process.wait()
        thread.join()

    assert any("forgotten" in leak for leak in leaks)
    # By its pid: a process just started has no command line for a moment.
    assert any(leak.startswith(f"process {process.pid}:") for leak in leaks)
    assert before.leaks() == []


def test_a_started_process_ends_with_its_test_and_so_do_its_own_children() -> None:
    before = Snapshot.take()
    running = Processes()
    running.start("parent", ["sh", "-c", "sleep 60 & sleep 60"])

    running.stop_all()

    assert before.leaks() == []


def test_waiting_for_what_does_not_happen_says_what_was_seen_last() -> None:
    with pytest.raises(AssertionError, match=r"last seen: \[\]\nthe log"):
        eventually(list, 0.05, told=lambda: "the log")


def test_settings_survive_the_way_through_an_environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(settings).items():
        if name.startswith("OMNIRT_"):
            monkeypatch.setenv(name, value)

    assert Settings() == settings
