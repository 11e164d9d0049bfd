"""Children that cannot outlive their parent."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from omnirt_tasks.child_process import ChildProcess
from tests.support.waiting import eventually

# Tells its pid, then sleeps; the second ignores SIGTERM.
SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"


@pytest.fixture
def started() -> Iterator[list[ChildProcess]]:
    """Children to be stopped at the end, whatever the test did with them."""
    children: list[ChildProcess] = []
    yield children
    for child in children:
        child.stop()


def first_line(child: ChildProcess) -> str:
    return str(eventually(lambda: list(child.last_lines), told=lambda: f"exit {child.exit_code}")[0])


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_tells_lines_the_exit_code_and_the_end(started: list[ChildProcess]) -> None:
    lines: list[str] = []
    ended = threading.Event()
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(7)"
    child = ChildProcess("c", [sys.executable, "-uc", code], on_line=lines.append, on_exit=lambda _: ended.set())
    started.append(child)

    assert ended.wait(10)
    assert lines == ["one", "two"]
    assert child.exit_code == 7


def test_a_command_that_is_not_there_ends_with_127_and_says_so(started: list[ChildProcess]) -> None:
    child = ChildProcess("c", ["/no/such/command"])
    started.append(child)

    assert child.wait(10)
    assert child.exit_code == 127
    assert "/no/such/command cannot be started" in child.last_lines[-1]


def test_stop_ends_it_by_sigterm(started: list[ChildProcess]) -> None:
    child = ChildProcess("c", [sys.executable, "-c", SLEEPER])
    started.append(child)
    pid = int(first_line(child))

    child.stop()
    child.stop()

    eventually(lambda: is_gone(pid))
    assert child.exit_code == 128 + signal.SIGTERM


def test_what_ignores_sigterm_is_killed_after_its_grace(started: list[ChildProcess]) -> None:
    child = ChildProcess("c", [sys.executable, "-c", STUBBORN], grace_s=0.3)
    started.append(child)
    pid = int(first_line(child))

    child.stop()

    eventually(lambda: is_gone(pid))


def test_once_it_is_stopped_nothing_of_its_group_is_left(started: list[ChildProcess]) -> None:
    # Hundreds of megabytes take the kernel a moment to take back; the output is nobody's, so its end tells nothing.
    heavy = f"import mmap; held = mmap.mmap(-1, 300_000_000); held.write(bytes(300_000_000)); {SLEEPER}"
    code = (
        "import sys; from subprocess import DEVNULL, PIPE, Popen;"
        f"left = Popen([sys.executable, '-c', {heavy!r}], stdout=PIPE, stderr=DEVNULL);"
        "print(left.stdout.readline().decode(), end='', flush=True)"
    )
    child = ChildProcess("c", [sys.executable, "-W", "ignore", "-c", code])
    started.append(child)

    assert child.wait(20)

    assert is_gone(int(first_line(child)))


def test_what_the_command_started_itself_ends_with_it(started: list[ChildProcess]) -> None:
    code = (
        "import subprocess, sys;"
        f"left = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], stdout=subprocess.PIPE, text=True);"
        "print(left.stdout.readline(), end='', flush=True)"
    )
    child = ChildProcess("c", [sys.executable, "-W", "ignore", "-c", code])
    started.append(child)

    assert child.wait(10)
    left = int(first_line(child))
    eventually(lambda: is_gone(left))


def test_ctrl_c_in_our_terminal_does_not_reach_it(started: list[ChildProcess]) -> None:
    child = ChildProcess("c", [sys.executable, "-c", SLEEPER])
    started.append(child)

    assert os.getpgid(int(first_line(child))) != os.getpgid(0)


@pytest.mark.parametrize("code", [SLEEPER, STUBBORN], ids=["willing", "stubborn"])
def test_it_ends_when_its_parent_is_killed(code: str, tmp_path: Path) -> None:
    parent_code = (
        "import sys, time; from omnirt_tasks.child_process import ChildProcess;"
        f"ChildProcess('c', [sys.executable, '-c', {code!r}], grace_s=0.3, on_line=lambda l: print(l, flush=True));"
        "time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())

        parent.kill()

    eventually(lambda: is_gone(pid))


def test_it_ends_when_only_its_guard_is_killed(started: list[ChildProcess]) -> None:
    child = ChildProcess("c", [sys.executable, "-c", SLEEPER])
    started.append(child)
    pid = int(first_line(child))

    os.kill(child.pid, signal.SIGKILL)

    assert child.wait(10)
    assert child.exit_code == 128 + signal.SIGKILL
    eventually(lambda: is_gone(pid))
