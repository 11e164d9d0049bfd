"""`omnirt up`, as a process: a whole system that starts, works and ends as one."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnirt_tasks import requests
from omnirt_tasks.client import Client
from omnirt_tasks.contract import JobState
from omnirt_tasks.embedded import free_port
from tests.support.commands import Command
from tests.support.waiting import eventually

QUEUE = "cpu-stub-stub"
REQUEST = requests.text2image(model="stub", prompt="a cat")


class Up:
    """Starts `omnirt up` in one folder, again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def __call__(self, *arguments: str) -> Command:
        env = {
            "OMNIRT_DATA_DIR": str(self._folder / "data"),
            "OMNIRT_RUN_DIR": str(self._folder / "run"),
            "OMNIRT_PORT": str(self._port),
            "OMNIRT_ALLOW_STUB": "true",
            "OMNIRT_GRACE_S": "1",
        }
        return Command("up", *arguments, cwd=self._folder, env=env)


@pytest.fixture
def up(tmp_path: Path) -> Up:
    return Up(tmp_path)


@pytest.fixture
def client(up: Up) -> Iterator[Client]:
    with Client(up.url) as client:
        yield client


def test_it_says_where_it_is_runs_jobs_and_stops_whole(up: Up, client: Client) -> None:
    with up("-Q", QUEUE) as system:
        assert up.url in system.until("Ready: ")
        assert client.generate(REQUEST, timeout_s=20).outputs

        system.send(signal.SIGTERM)

        assert system.result() == 0, system.told()
        assert system.left() == []
    labels = {line.split("]")[0] for line in system.out if line.startswith("[")}
    assert labels >= {"[worker", "[gateway"}
    assert system.out[-1] == "Stopped."


def test_jobs_are_still_there_after_a_restart(up: Up, client: Client) -> None:
    with up("-Q", QUEUE) as system:
        system.until("Ready: ")
        job = client.submit(REQUEST)
        client.wait(job.id, 20)
        system.send(signal.SIGINT)
        assert system.result() == 0
        assert system.left() == []
    with up("-Q", QUEUE) as system:
        system.until("Ready: ")
        assert client.job(job.id).state is JobState.SUCCEEDED
        system.send(signal.SIGINT)
        assert system.result() == 0


@pytest.mark.parametrize(
    ("part", "words"), [("broker", "valkey-server"), ("worker", "celery -A"), ("gateway", "cli serve")]
)
def test_when_a_part_dies_it_says_which_and_stops_the_others(up: Up, part: str, words: str) -> None:
    with up("-Q", QUEUE) as system:
        system.until("Ready: ")

        for process in system.processes(words):
            if "guard.py" not in " ".join(process.cmdline()):
                process.kill()

        assert system.result() == 1, system.told()
        assert system.left() == []
    assert any(f"The {part} ended with exit status 137" in line for line in system.err), system.told()


def test_a_worker_that_cannot_start_stops_everything_and_its_words_are_told(up: Up) -> None:
    with up("-Q", "ascend-sdxl") as system:
        assert system.result() == 1, system.told()
        assert system.left() == []
    assert any("The worker ended with exit status" in line for line in system.err), system.told()


def test_killed_outright_it_leaves_no_process(up: Up) -> None:
    with up("-Q", QUEUE) as system:
        system.until("Ready: ")

        system.send(signal.SIGKILL)

        assert system.result() == -signal.SIGKILL
        eventually(lambda: not system.left(), 20, told=lambda: "\n".join(system.left()))
