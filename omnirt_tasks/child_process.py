"""A child process that cannot outlive this one: every child runs under a guard (see `guard`)."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
LAST_LINES = 40
LINE_BYTES_MAX = 64 * 1024
GONE_TIMEOUT_S = 5.0  # what was killed vanishes at once, unless the kernel or a lazy init holds it
GONE_POLL_S = 0.005


class ChildProcess:
    """One command as a child in a process group of its own, so that Ctrl-C in a terminal reaches only us.

    Its output (both streams, by lines) goes to `on_line`, called from a thread; the last lines are kept.
    `on_exit` is called, from a thread, once the command has ended. Asked to stop, it has `grace_s` before it is killed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        grace_s: float = 10.0,
        on_line: Callable[[str], None] | None = None,
        on_exit: Callable[["ChildProcess"], None] | None = None,
    ) -> None:
        """Start it. Raises OSError when no process can be made; a command that is not there ends with 127."""
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._grace_s = grace_s
        self._on_line = on_line
        self._on_exit = on_exit
        self._ended = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(grace_s), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"{name}-output", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name=f"{name}-wait", daemon=True).start()

    @property
    def pid(self) -> int:
        """The id of the process group, which is the guard's."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The command's exit status, 128 + n for signal n; None while it runs."""
        if not self._ended.is_set():
            return None
        code: int = self._process.returncode  # negative when the guard itself was killed
        return code if code >= 0 else 128 - code

    def ask_to_stop(self) -> None:
        """Have it ended (SIGTERM, then SIGKILL after its grace), and return at once. Idempotent."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()

    def stop(self) -> None:
        """Have it ended, and return when nothing of its process group is left. Idempotent."""
        self.ask_to_stop()
        if not self._ended.wait(self._grace_s + 1.0):
            self.kill()
            self._ended.wait()

    def kill(self) -> None:
        """Kill the whole process group now."""
        if self._ended.is_set():
            return  # the number of the group may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most `timeout_s`."""
        return self._ended.wait(timeout_s)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while raw := stream.readline(LINE_BYTES_MAX):
                line = raw.decode(errors="replace").rstrip("\r\n")
                self.last_lines.append(line)
                if self._on_line is not None:
                    self._on_line(line)

    def _wait(self) -> None:
        self._process.wait()
        self._clear_group()  # of what the command itself left behind
        self._reader.join(GONE_TIMEOUT_S)  # who left the group may still hold the output
        self._ended.set()
        if self._on_exit is not None:
            self._on_exit(self)

    def _clear_group(self) -> None:
        deadline = time.monotonic() + GONE_TIMEOUT_S
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left, or on macOS: only zombies
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, signal.SIGKILL)
                time.sleep(GONE_POLL_S)
