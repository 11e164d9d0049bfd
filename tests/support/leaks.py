"""What a test left behind: threads and child processes that were not there before it."""

import threading
import time
from dataclasses import dataclass

import psutil

GRACE_S = 3.0
# Made once per process by libraries, on first use, and kept by design.
LASTING_THREADS = ("tqdm", "pytest_timeout", "asyncio_", "fsspecIO", "AnyIO worker thread")


@dataclass(frozen=True)
class Snapshot:
    """The threads (by identity) and child processes (by pid and start) of this moment."""

    threads: frozenset[threading.Thread]
    children: frozenset[psutil.Process]

    @classmethod
    def take(cls) -> "Snapshot":
        """What there is now."""
        return cls(frozenset(threading.enumerate()), frozenset(psutil.Process().children(recursive=True)))

    def leaks(self, grace_s: float = GRACE_S) -> list[str]:
        """What is there now and was not then, in words; what is about to end has `grace_s` to do so."""
        deadline = time.monotonic() + grace_s
        while True:
            now = Snapshot.take()
            threads = [thread for thread in now.threads - self.threads if not _lasting(thread)]
            children = [child for child in now.children - self.children if _alive(child)]
            if not (threads or children):
                return []
            if time.monotonic() > deadline:
                return [f"thread {thread.name!r}" for thread in threads] + [_told(child) for child in children]
            time.sleep(0.02)


def _lasting(thread: threading.Thread) -> bool:
    return thread.name.startswith(LASTING_THREADS) or type(thread).__module__.startswith("tqdm")


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _told(process: psutil.Process) -> str:
    try:
        return f"process {process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"process {process.pid}"
