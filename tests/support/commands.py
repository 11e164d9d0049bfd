"""The `omnirt` command as a process, as a person at a terminal starts it, and what it leaves behind."""

import contextlib
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

import psutil

from omnirt_tasks.settings import PREFIX
from tests.support.waiting import eventually

MARK = "TESTED_COMMAND"
PROJECT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0
GONE = -1


class Command:
    """`omnirt ARGUMENTS` in a folder, in a process group of its own; a context manager that kills what is left.

    Every process that comes of it, however distant, is known by a mark in its environment, or by the process group
    of one that has it: a server that rewrites its title (Valkey) writes over its environment.
    """

    def __init__(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self._mark = uuid.uuid4().hex
        self._groups: set[int] = set()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "omnirt_tasks.cli", *arguments],
            cwd=cwd,
            env=inherited | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", MARK: self._mark} | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self.out)),
            threading.Thread(target=self._read, args=(self._process.stderr, self.err)),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def until(self, words: str) -> str:
        """The first line, of either stream, that has these words."""

        def found() -> str | None:
            self._came_of_it()
            line = next((line for line in [*self.out, *self.err] if words in line), None)
            assert line is not None or self._process.poll() is None, f"it ended before {words!r}:\n{self.told()}"
            return line

        return str(eventually(found, TIMEOUT_S, told=self.told))

    def send(self, number: int) -> None:
        """Send a signal to the command alone."""
        self._process.send_signal(number)

    def result(self) -> int:
        """The exit status, once it has ended."""
        return self._process.wait(TIMEOUT_S)

    def told(self) -> str:
        return "\n".join([*self.out, *self.err])

    def left(self) -> list[str]:
        """The command lines of everything that came of it and still runs."""
        return [_line(process) for process in self._came_of_it()]

    def processes(self, words: str) -> list[psutil.Process]:
        """What came of it and has these words in its command line."""
        return [process for process in self._came_of_it() if words in _line(process)]

    def _came_of_it(self) -> list[psutil.Process]:
        alive = [process for process in psutil.process_iter() if _alive(process)]
        self._groups |= {_group(process) for process in alive if self._is_marked(process)}
        self._groups.discard(GONE)
        return [process for process in alive if _group(process) in self._groups]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark
        except psutil.Error:
            return False

    @staticmethod
    def _read(stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line.rstrip("\n"))  # noqa: PERF401 - each is to be seen when it comes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._came_of_it():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return GONE


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
