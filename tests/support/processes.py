"""The real system as processes: workers, gateways, and any other command; whatever happens, they end."""

import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.graces import GATEWAY_GRACE_S, GATEWAY_MARGIN_S
from omnirt_tasks.settings import PREFIX, Settings, environment_without_settings, load_settings
from tests.support.waiting import eventually

PROJECT = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 45.0  # a worker on a busy machine imports for a while
STOP_GRACE_S = GATEWAY_GRACE_S + GATEWAY_MARGIN_S


def environment(settings: Settings, **extra: str) -> dict[str, str]:
    """The environment in which a process has these settings: ours, without its OMNIRT_ variables, plus theirs."""
    given = {PREFIX + name.upper(): _as_text(getattr(settings, name)) for name in settings.model_fields_set}
    quiet = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return environment_without_settings() | quiet | given | extra


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Processes:
    """Starts processes for one test, and ends them all with it."""

    def __init__(self) -> None:
        self._children: list[ChildProcess] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = PROJECT,
        on_line: Callable[[str], None] | None = None,
    ) -> ChildProcess:
        """Start a command. It runs in the project's root unless told otherwise."""
        child = ChildProcess(name, command, env=env, cwd=cwd, grace_s=STOP_GRACE_S, on_line=on_line)
        self._children.append(child)
        return child

    def worker(
        self, settings: Settings, *queues: str, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> ChildProcess:
        """`celery -A omnirt_tasks worker -Q …`, once it takes messages of all its queues."""
        ready: list[str] = []

        def watch(line: str) -> None:
            if " ready." in line:
                ready.append(line)

        child = self.start_worker(settings, *queues, arguments=arguments, env=env, on_line=watch)
        eventually(lambda: ready or child.exit_code is not None, READY_TIMEOUT_S, told=lambda: _tail(child))
        assert ready, f"the worker ended with {child.exit_code}:\n{_tail(child)}"
        return child

    def start_worker(
        self,
        settings: Settings,
        *queues: str,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> ChildProcess:
        """`celery -A omnirt_tasks worker -Q …`, whatever becomes of it."""
        command = [sys.executable, "-m", "celery", "-A", "omnirt_tasks", "worker", "-l", "INFO"]
        command += ["-Q", ",".join(queues), *arguments]
        return self.start("worker", command, env=environment(settings, **(env or {})), on_line=on_line)

    def gateway(self, settings: Settings, *, env: Mapping[str, str] | None = None) -> tuple[ChildProcess, str]:
        """`omnirt serve`, once it answers: the process and its URL, without a slash at the end.

        It listens on the settings' port if they name one, else on a free one.
        """
        port = settings.port if "port" in settings.model_fields_set else free_port()
        variables = environment(settings, **{PREFIX + "PORT": str(port)}, **(env or {}))
        child = self.start("gateway", [sys.executable, "-m", "omnirt_tasks.cli", "serve"], env=variables)
        url = f"http://127.0.0.1:{port}"
        eventually(
            lambda: child.exit_code is not None or _answers(f"{url}/healthz"),
            READY_TIMEOUT_S,
            told=lambda: _tail(child),
        )
        assert child.exit_code is None, f"the gateway ended with {child.exit_code}:\n{_tail(child)}"
        return child, url

    def stop_all(self) -> None:
        """End every process, all asked at once."""
        for child in self._children:
            child.ask_to_stop()
        for child in self._children:
            child.stop()
        self._children.clear()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310  # a loopback URL of our own
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(child: ChildProcess) -> str:
    return "\n".join(child.last_lines)


def _as_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=str)
    return str(value)


@contextmanager
def small_system(folder: Path, *queues: str, **settings: object) -> Iterator[str]:
    """A gateway with a broker and a worker for each of the queues; where it listens. All data lie below the folder."""
    running = Processes()
    with EmbeddedBroker() as broker:
        own = load_settings(
            redis_url=broker.url,
            data_dir=folder / "data",
            run_dir=folder / "run",
            allow_stub=True,
            grace_s=1.0,
            **settings,
        )
        try:
            for queue in queues:
                running.worker(own, queue)
            yield running.gateway(own)[1]
        finally:
            running.stop_all()
