"""A whole system on this host: embedded broker, one worker and one gateway, as child processes.

    start:  broker ─► worker and gateway at once ─► ready when /readyz shows every queue with a worker
    stop:   gateway and worker ─► broker

Every child has a guard (see `child_process`), so nothing outlives this process, whatever ends it.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.client import Client
from omnirt_tasks.embedded import EmbeddedBroker, free_port
from omnirt_tasks.errors import OmnirtError, OperatorError
from omnirt_tasks.graces import GATEWAY_GRACE_S, GATEWAY_MARGIN_S
from omnirt_tasks.routing import plain_name
from omnirt_tasks.settings import PREFIX, Fsync, environment_without_settings

READY_TIMEOUT_S = 180.0  # a first start may read gigabytes of libraries from a cold disk
READY_POLL_S = 0.05
LINES_TOLD = 12


def worker_command(queues: Sequence[str], log_level: str) -> list[str]:
    """The command line of a worker for these queues; everything else comes from the Celery app."""
    celery = [sys.executable, "-m", "celery", "-A", "omnirt_tasks"]
    # Mingling waits a second for what other workers know; here the job records know it.
    return [*celery, "worker", "-Q", ",".join(queues), "--loglevel", log_level, "--without-mingle"]


def hermetic_environment(**settings: object) -> dict[str, str]:
    """This process's environment with these settings, by their names, in place of every one that it has."""
    named = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in settings.items()}
    return environment_without_settings() | {f"{PREFIX}{name.upper()}": value for name, value in named.items()}


class System:
    """Broker, worker and gateway under one roof: a context manager whose ends are `start` and `stop`.

    The gateway listens at `host` and `port` (0: a free one). A leaving worker has `worker_grace_s` before it is killed,
    which is more than its settings grant its jobs. `environment` is what the children get, with the broker's URL and
    the port added. `broker_dir` keeps the broker's data (None: they go with it), which reach the disk as `broker_fsync`
    says; with `embedded_broker` false the children use the Redis that `environment` names. `on_line` gets (child's
    name, line) for every line of output, from several threads.
    """

    def __init__(
        self,
        *,
        queues: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[[str, str], None],
        worker_grace_s: float,
        log_level: str = "INFO",
        host: str = "127.0.0.1",
        port: int = 0,
        embedded_broker: bool = True,
        broker_dir: Path | None = None,
        broker_fsync: Fsync = Fsync.ALWAYS,
        cwd: Path | None = None,
    ) -> None:
        self._queues = tuple(queues)
        self._environment = dict(environment)
        self._on_line = on_line
        self._cwd = cwd
        self._log_level = log_level
        self._host = host
        self._port = port
        self._worker_grace_s = worker_grace_s
        self._one_ended = threading.Event()
        self._broker: EmbeddedBroker | None = None
        if embedded_broker:
            self._broker = EmbeddedBroker(
                data_dir=broker_dir,
                fsync=broker_fsync,
                on_line=lambda line: on_line("broker", line),
                on_exit=lambda _: self._one_ended.set(),
            )
        self._children: list[ChildProcess] = []

    @property
    def url(self) -> str:
        """Where the gateway listens; known once it was started."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def redis_url(self) -> str:
        """The Redis that the children use, with its password; known once it was started."""
        return self._environment["OMNIRT_REDIS_URL"]

    def start(self) -> None:
        """Start everything, and return when jobs can run. What was started is stopped again if that fails.

        Raises OperatorError when a child ends, or is not ready in time, with its last lines.
        """
        try:
            if self._broker is not None:
                self._broker.start()
                self._environment["OMNIRT_REDIS_URL"] = self._broker.url
            self._port = self._port or free_port()
            self._environment |= {"OMNIRT_HOST": self._host, "OMNIRT_PORT": str(self._port), "PYTHONUNBUFFERED": "1"}
            self._launch("worker", worker_command(self._queues, self._log_level), self._worker_grace_s)
            self._launch(
                "gateway", [sys.executable, "-m", "omnirt_tasks.cli", "serve"], GATEWAY_GRACE_S + GATEWAY_MARGIN_S
            )
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def wait(self) -> NoReturn:
        """Wait until a child ends, which none should, and raise OperatorError with its last lines."""
        while True:
            self._watch_children()

    def stop(self) -> None:
        """Stop everything in order, and return when nothing is left; interrupted, kill what is left. Idempotent."""
        try:
            for child in reversed(self._children):
                child.ask_to_stop()
            for child in reversed(self._children):
                child.stop()
            self._children.clear()
            if self._broker is not None:
                self._broker.stop()
        except BaseException:
            for child in self._running():
                child.kill()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _running(self) -> list[ChildProcess]:
        broker = self._broker.child if self._broker is not None else None
        return [*([broker] if broker is not None else []), *self._children]

    def _launch(self, name: str, command: Sequence[str], grace_s: float) -> None:
        self._children.append(
            ChildProcess(
                name,
                command,
                env=self._environment,
                cwd=self._cwd,
                grace_s=grace_s,
                on_line=lambda line: self._on_line(name, line),
                on_exit=lambda _: self._one_ended.set(),
            )
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        with Client(self.url) as client:
            while not self._is_ready(client):
                self._watch_children(READY_POLL_S)
                if time.monotonic() > deadline:
                    told = "\n".join(f"  {line}" for child in self._running() for line in list(child.last_lines)[-4:])
                    raise OperatorError(f"The system is not ready after {READY_TIMEOUT_S:.0f} s. Last lines:\n{told}")

    def _is_ready(self, client: Client) -> bool:
        try:
            ready = client.ready()
        except OmnirtError:  # the gateway is not there yet; a child that ended is told of by the caller
            return False
        names = map(plain_name, self._queues)
        return ready.ok and all(name in ready.queues and ready.queues[name].workers for name in names)

    def _watch_children(self, timeout_s: float | None = None) -> None:
        """Wait until a child's end is told, or for `timeout_s`. Raises OperatorError when one of ours has ended."""
        self._one_ended.wait(timeout_s)
        self._one_ended.clear()  # it only wakes: a broker that lost its port, and was started anew, has ended too
        for child in self._running():
            if child.exit_code is not None:
                told = "\n".join(f"  {line}" for line in list(child.last_lines)[-LINES_TOLD:])
                raise OperatorError(
                    f"The {child.name} ended with exit status {child.exit_code}. Its last lines:\n{told}"
                )
