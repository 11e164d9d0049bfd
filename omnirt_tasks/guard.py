"""Runs one command and ends it when its own standard input does: `python -I -S guard.py GRACE_S COMMAND…`.

    parent ══ pipe ══► guard ──► command          one process group, led by the guard

The parent holds the pipe's other end. Closing it asks for the end, and so does the parent's death, even by SIGKILL:
then nothing that it started lives on. Works alike on Linux and macOS. Only the standard library, and little of it,
so that a guard starts in a few milliseconds.
"""

import os
import select
import signal
import sys
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NOT_FOUND = 127


def main(grace_s: float, command: list[str]) -> int:
    """The command's exit status (128 + n for signal n); it gets `grace_s` between SIGTERM and SIGKILL."""
    parent = os.getppid()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (*STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # the wakeup pipe tells; the command starts with the defaults
    try:
        pid = os.posix_spawnp(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsigdef=[signal.SIGPIPE],
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error}\n")
        return NOT_FOUND
    deadline: float | None = None
    parent_alive = True
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([wake_read, *([0] if parent_alive else [])], [], [], timeout_s)
        asked = wake_read in ready and any(number in STOP_SIGNALS for number in os.read(wake_read, 512))
        if 0 in ready and not os.read(0, 512):
            parent_alive, asked = False, True
        if asked and deadline is None:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
        elif deadline is not None and time.monotonic() >= deadline:
            os.killpg(0, signal.SIGKILL)
    if os.getppid() != parent:  # who would clear the group is gone
        os.killpg(0, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
