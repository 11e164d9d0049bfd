"""`omnirt generate`, `jobs` and their exit codes against a running system."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omnirt_tasks.client import Client
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.requests import text2image
from omnirt_tasks.settings import Settings
from tests.support.commands import Command
from tests.support.processes import Processes
from tests.support.waiting import eventually

Omnirt = Callable[..., Command]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway with a stub worker behind it."""
    folder = tmp_path_factory.mktemp("system")
    running = Processes()
    with EmbeddedBroker() as broker:
        settings = Settings(
            redis_url=broker.url, data_dir=folder / "data", run_dir=folder / "run", allow_stub=True, grace_s=1.0
        )
        try:
            running.worker(settings, "cpu-stub-stub")
            yield running.gateway(settings)[1]
        finally:
            running.stop_all()


@pytest.fixture
def omnirt(url: str, tmp_path: Path) -> Omnirt:
    """Starts the command with OMNIRT_URL in its environment."""
    return lambda *arguments: Command(*arguments, cwd=tmp_path, env={"OMNIRT_URL": url})


def generate(omnirt: Omnirt, *more: str) -> Command:
    return omnirt("generate", "--model", "stub", "--prompt", "a cat", "--seed", "7", *more)


def test_generate_saves_the_picture_and_keeps_progress_off_standard_output(omnirt: Omnirt, tmp_path: Path) -> None:
    with generate(omnirt) as command:
        assert command.result() == 0, command.told()
    assert command.out == ["out/a-cat-7.png  (seed 7)"]
    assert "denoising" in command.err
    assert (tmp_path / "out" / "a-cat-7.png").read_bytes().startswith(b"\x89PNG")


def test_a_job_is_sent_watched_and_shown_by_its_id(omnirt: Omnirt, tmp_path: Path) -> None:
    with generate(omnirt, "--no-wait") as command:
        assert command.result() == 0, command.told()
    (job_id,) = command.out
    with omnirt("jobs", "watch", job_id, "-o", "cat.png", "--json") as command:
        assert command.result() == 0, command.told()
    assert json.loads("\n".join(command.out))["files"] == ["cat.png"]
    assert (tmp_path / "cat.png").is_file()
    with omnirt("jobs", "show", job_id, "--json") as command:
        assert command.result() == 0
    assert json.loads("\n".join(command.out))["state"] == "succeeded"
    with omnirt("jobs", "list", "--json") as command:
        assert command.result() == 0
    assert job_id in {job["id"] for job in json.loads("\n".join(command.out))}


def test_the_same_command_again_under_a_key_follows_the_same_job(omnirt: Omnirt, tmp_path: Path) -> None:
    jobs = []
    for _ in range(2):
        with generate(omnirt, "--idempotency-key", "my cat", "--json") as command:
            assert command.result() == 0, command.told()
        jobs.append(json.loads("\n".join(command.out))["job"]["id"])
    with generate(omnirt, "--idempotency-key", "my cat", "--steps", "3") as command:
        assert command.result() == 2

    assert jobs[0] == jobs[1]
    assert any(line.startswith("idempotency_mismatch: ") for line in command.err), command.told()


def test_a_key_without_a_gateway_is_wrong_usage(tmp_path: Path) -> None:
    with Command(
        "generate", "--model", "stub", "--prompt", "x", "--idempotency-key", "my cat", cwd=tmp_path
    ) as command:
        assert command.result() == 2
    assert "needs a gateway" in command.told()


def test_ctrl_c_cancels_the_job_and_is_130(omnirt: Omnirt) -> None:
    with generate(omnirt, "--set", "step_ms=500") as command:
        command.until("denoising")
        command.send(signal.SIGINT)
        assert command.result() == 130, command.told()
    with omnirt("jobs", "list", "--limit", "1", "--json") as command:
        assert command.result() == 0
    (job,) = json.loads("\n".join(command.out))
    assert job["cancel_requested"] is True
    with omnirt("jobs", "watch", job["id"]) as command:
        assert command.result() == 4, command.told()
    with omnirt("jobs", "cancel", job["id"], "--json") as command:
        assert command.result() == 0
    assert json.loads("\n".join(command.out)) == {job["id"]: "already_finished"}


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--set", "fail_at_step=1"], 3, "model_failed: "),
        (["--set", "step_ms=300", "--timeout", "0.3"], 5, "timeout: "),
        (["--set", "step_ms=300", "--deadline", "0.4"], 3, "timeout: "),
        (["--deadline", "0"], 2, "validation_failed: "),
        (["--set", "width=99"], 2, "validation_failed: "),
        (["--url", "http://127.0.0.1:1"], 6, "gateway_unreachable: "),
    ],
)
def test_each_end_has_its_exit_code_and_its_line(omnirt: Omnirt, more: list[str], status: int, words: str) -> None:
    with generate(omnirt, *more) as command:
        assert command.result() == status, command.told()
    assert any(line.startswith(words) for line in command.err), command.told()
    assert command.out == []


def test_who_waits_is_told_his_place_and_about_how_long(omnirt: Omnirt, url: str) -> None:
    with Client(url) as client:
        client.generate(text2image(model="stub", prompt="x", step_ms=5))  # so that it is known how long one takes
        slow = text2image(model="stub", prompt="x", num_inference_steps=200, step_ms=100)
        jobs = [client.submit(slow).id for _ in range(12)]

        last = eventually(lambda: queue if (queue := client.job(jobs[-1]).queue) and queue.eta_s else None)

        with omnirt("jobs", "list") as command:
            assert command.result() == 0, command.told()
    with omnirt("jobs", "cancel", *jobs) as cancelled:
        assert cancelled.result() == 0, cancelled.told()

    (told,) = (line for line in command.out if jobs[-1] in line)
    assert re.search(r"#\d+ ~\d+ (s|min) .* stub$", told.rstrip()), command.out  # on one line of 80 columns
    assert last is not None
    assert 0 < (last.eta_s or 0) <= (last.eta_p90_s or 0)
