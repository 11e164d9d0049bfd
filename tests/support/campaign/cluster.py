"""A system of real processes that is started anew wherever it dies."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.client import Client
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.errors import OmnirtError
from omnirt_tasks.settings import load_settings
from tests.support.processes import PROJECT, environment, free_port
from tests.support.waiting import eventually

READY_S = 90.0
LOOK_EVERY_S = 0.1
GRACE_S = 10.0
FORESEEN_EXITS = {0, 128 + signal.SIGKILL}


@dataclass
class Member:
    """A process of the system; its owner is the cluster, whose keeper replaces `child`."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    child: ChildProcess | None = None
    exits: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int | None:
        """The id of the command's own process, which stands below a guard; None while it does not run."""
        if self.child is None or self.child.exit_code is not None:
            return None
        try:
            below = psutil.Process(self.child.pid).children()
        except psutil.NoSuchProcess:
            return None
        return below[0].pid if below else None


class Cluster:
    """One broker whose data outlive it, two gateways, two stub workers, and one that draws.

    The second stub worker's clock is an hour ahead. `storage_dir` holds the artifacts. Whatever ends is started anew,
    until `stop`.
    """

    def __init__(self, folder: Path, storage_dir: Path, **settings: object) -> None:
        self.broker = EmbeddedBroker(data_dir=folder / "broker", port=free_port())
        self.broker.start()
        self.settings = load_settings(
            redis_url=self.broker.url,
            data_dir=storage_dir,
            run_dir=folder / "run",
            allow_stub=True,
            cpu_devices=2,
            torch_threads=1,
            placement="process",
            **settings,
        )
        self.gateways = [self._gateway(f"gateway-{number}") for number in (1, 2)]
        self.workers = [
            self._worker("stub-1", "cpu-stub-stub"),
            self._worker("stub-2", "cpu-stub-stub", **wrong_clock(folder)),
            self._worker("shapes-1", "cpu-shapes"),
        ]
        self.members = [member for _, member in self.gateways] + self.workers
        self.unforeseen: list[str] = []
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="campaign-keeper", daemon=True)

    def start(self) -> None:
        """Start every process, and return once all queues have their workers."""
        for member in self.members:
            self._start(member)
        self._keeper.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Return once every gateway tells that all queues have their workers."""
        for url in self.urls:
            with Client(url) as client:
                eventually(lambda client=client: self._is_ready(client), READY_S, told=self.tell)  # type: ignore[misc]

    def stop(self) -> None:
        """End every process. Idempotent."""
        self._closing.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        children = [member.child for member in self.members if member.child is not None]
        for child in children:
            child.ask_to_stop()
        for child in children:
            child.stop()
        self.broker.stop()

    @property
    def urls(self) -> list[str]:
        """Where the gateways listen; they keep their ports."""
        return [url for url, _ in self.gateways]

    def kill_broker(self) -> None:
        """SIGKILL the broker; it stays away until `restart_broker`."""
        child = self.broker.child
        assert child is not None
        child.kill()
        child.wait(GRACE_S)

    def restart_broker(self) -> None:
        """Start the broker on the data that it left."""
        self.broker.stop()
        self.broker.start()

    def tell(self) -> str:
        """The last lines of every process, for whoever has to find out what went wrong."""
        told = []
        for member in self.members:
            lines = list(member.child.last_lines)[-12:] if member.child is not None else []
            told.append("\n".join([f"--- {member.name}, ended with {member.exits} so far", *lines]))
        return "\n".join(told)

    def _is_ready(self, client: Client) -> bool:
        try:
            ready = client.ready()
        except OmnirtError:
            return False
        counts = {name: queue.workers for name, queue in ready.queues.items()}
        return ready.ok and counts.get("cpu-stub-stub") == 2 and counts.get("cpu-shapes") == 1

    def _gateway(self, name: str) -> tuple[str, Member]:
        port = free_port()
        env = environment(self.settings, OMNIRT_PORT=str(port))
        return f"http://127.0.0.1:{port}", Member(name, [sys.executable, "-m", "omnirt_tasks.cli", "serve"], env)

    def _worker(self, name: str, queue: str, **env: str) -> Member:
        command = [sys.executable, "-m", "celery", "-A", "omnirt_tasks", "worker", "-Q", queue]
        command += ["-l", "INFO", "--without-mingle", "--without-gossip"]
        return Member(name, command, environment(self.settings, OMNIRT_WORKER_NAME=name, **env))

    def _start(self, member: Member) -> None:
        member.child = ChildProcess(member.name, member.command, env=member.env, cwd=PROJECT, grace_s=GRACE_S)

    def _keep(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for member in self.members:
                if member.child is not None and (code := member.child.exit_code) is not None:
                    member.exits.append(code)
                    if code not in FORESEEN_EXITS:
                        self.unforeseen.append(
                            "\n".join([f"--- {member.name} ended with {code}", *member.child.last_lines])
                        )
                    member.child.stop()  # closes its pipe
                    self._start(member)


def wrong_clock(folder: Path) -> dict[str, str]:
    """The environment of a process whose calendar is an hour ahead; none where that needs more than Linux and gcc."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        return {}
    library = folder / "wrong_clock.so"
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library)}


def processes_below(pid: int) -> list[psutil.Process]:
    """The process and everything below it; none when it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
