"""Many pictures, of many prompts, in one job: over HTTP and from the command line, with workers that run its parts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from omnirt_tasks.client import Client
from omnirt_tasks.contract import Artifact, EventName, JobState
from omnirt_tasks.requests import text2image
from tests.support.commands import Command
from tests.support.processes import small_system
from tests.support.waiting import eventually

WAIT_S = 120.0
PROMPTS = ["a large red circle on a blue background", "a small green star on a white background", "a yellow heart"]
LEVELS_APART = 1
"""By how much of 255 a pixel may differ: numbers that are 1e-3 apart may be rounded to neighbours."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway with two workers of the stub behind it, and one of shapes."""
    folder = tmp_path_factory.mktemp("system")
    with small_system(folder, "cpu-stub-stub", "cpu-stub-stub", "cpu-shapes", cpu_devices=2) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def pictures(client: Client, folder: Path, **options: Any) -> list[Image.Image]:
    """The pictures of a job of shapes, in order; looks at what is told of them."""
    seed: int = options["seed"]
    result = client.generate(text2image(model="shapes", num_inference_steps=8, **options), timeout_s=WAIT_S)
    assert [output.seed for output in result.outputs] == [seed + index for index in range(len(result.outputs))]
    assert [output.index for output in result.outputs] == list(range(len(result.outputs)))
    return [Image.open(file).convert("RGB") for file in client.download_all(result, folder)]


def apart(one: Image.Image, other: Image.Image) -> int:
    """By how much the pixel that differs most does."""
    differences = np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16))
    return int(differences.max())


def test_picture_i_is_the_same_however_many_are_made_with_it(client: Client, tmp_path: Path) -> None:
    of_many = pictures(client, tmp_path / "many", prompt=PROMPTS, num_images_per_prompt=2, seed=300)
    (split, *_) = client.jobs(model="shapes")
    assert split.parts is not None, "it ran in parts"
    assert len(of_many) == 6

    for number, prompt in enumerate(PROMPTS):
        first = 300 + 2 * number
        of_two = pictures(client, tmp_path / f"two{number}", prompt=prompt, num_images_per_prompt=2, seed=first)
        (of_one,) = pictures(client, tmp_path / f"one{number}", prompt=prompt, seed=first + 1)
        assert apart(of_two[0], of_many[2 * number]) <= LEVELS_APART
        assert apart(of_two[1], of_many[2 * number + 1]) <= LEVELS_APART
        assert apart(of_one, of_many[2 * number + 1]) <= LEVELS_APART
    assert apart(of_many[0], of_many[2]) > 50, "other prompts give other pictures"


def test_a_split_job_has_one_progress_and_one_end_over_sse(client: Client) -> None:
    job = client.submit(text2image(model="stub", prompt=PROMPTS, num_images_per_prompt=4, num_inference_steps=5))

    events = list(client.events(job.id, timeout_s=WAIT_S))

    assert job.parts is not None
    assert [event.event for event in events if event.terminal] == [EventName.JOB_FINISHED]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    steps = [event.data["step"] for event in events if event.event is EventName.STAGE_PROGRESS]
    assert steps == list(range(1, 5 * job.parts.total + 1))
    record = client.job(job.id)
    assert record.result is not None
    assert [output.name for output in record.result.outputs] == [f"{index}.png" for index in range(12)]


def test_a_synchronous_request_is_answered_with_all_pictures(url: str) -> None:
    body = {
        "task": "text2image",
        "model": "stub",
        "inputs": {"prompt": PROMPTS},
        "config": {"num_images_per_prompt": 5},
    }

    answer = httpx.post(f"{url}/v1/generate", json=body, timeout=WAIT_S)

    outputs = [Artifact.model_validate(output) for output in answer.json()["outputs"]]
    assert [output.index for output in outputs] == list(range(15))
    for output in outputs:
        with Image.open(io.BytesIO(httpx.get(f"{url}{output.url}").content)) as picture:
            assert picture.size == (64, 64)


def test_one_cancel_stops_all_parts_within_a_step(client: Client) -> None:
    job = client.submit(
        text2image(model="stub", prompt="a cat", num_images_per_prompt=16, num_inference_steps=200, step_ms=50)
    )
    eventually(lambda: client.job(job.id).progress, WAIT_S)

    client.cancel(job.id)

    events = list(client.events(job.id, timeout_s=WAIT_S))
    assert [event.event for event in events if event.terminal] == [EventName.JOB_CANCELLED]
    record = client.job(job.id)
    assert record.state is JobState.CANCELLED
    assert record.progress is not None
    assert record.progress.step < 200


def test_the_same_submit_again_gives_the_same_split_job(client: Client) -> None:
    request = text2image(model="stub", prompt=PROMPTS, num_images_per_prompt=3)

    first = client.submit(request, idempotency_key="nine shapes")
    client.wait(first.id, WAIT_S)
    again = client.submit(request, idempotency_key="nine shapes")

    assert (again.id, again.state) == (first.id, JobState.SUCCEEDED)
    started = [event for event in client.events(first.id) if event.event is EventName.PART_STARTED]
    assert first.parts is not None
    assert len(started) == first.parts.total, "every part ran once"


def test_the_command_shows_one_progress_and_saves_every_picture(url: str, tmp_path: Path) -> None:
    prompts = [argument for prompt in ("a cat", "a dog") for argument in ("--prompt", prompt)]
    arguments = ["generate", "--model", "stub", *prompts, "-n", "4", "--seed", "7", "--priority", "high"]

    with Command(*arguments, cwd=tmp_path, env={"OMNIRT_URL": url}) as command:
        assert command.result() == 0, command.told()

    names = [f"out/a-{'cat' if seed < 11 else 'dog'}-{seed}.png" for seed in range(7, 15)]
    assert command.out == [f"{name}  (seed {seed})" for seed, name in enumerate(names, 7)]
    assert all((tmp_path / name).is_file() for name in names)
    assert command.err.count("denoising") == 1, "of all its parts"


def test_the_command_shows_a_job_s_parts_and_priority(url: str, client: Client, tmp_path: Path) -> None:
    job = client.submit(text2image(model="stub", prompt="a cat", num_images_per_prompt=8, priority="low"))
    client.wait(job.id, WAIT_S)

    with Command("jobs", "show", job.id, "--json", cwd=tmp_path, env={"OMNIRT_URL": url}) as command:
        assert command.result() == 0, command.told()

    shown = json.loads("\n".join(command.out))
    assert shown["priority"] == "low"
    assert job.parts is not None
    total = job.parts.total
    assert shown["parts"] == {"total": total, "queued": 0, "running": 0, "succeeded": total}


def test_jobs_that_run_at_once_are_told_that_they_shared(client: Client) -> None:
    requests = [text2image(model="stub", prompt=f"{n}", num_inference_steps=100, step_ms=5) for n in range(4)]

    jobs = [client.submit(request) for request in requests]

    reports = [result.metadata for job in jobs if (result := client.wait(job.id, WAIT_S).result) is not None]
    assert max(report.batch_size for report in reports) > 1
    for report in reports:
        told = report.model_dump_json()
        assert not any(other.id in told for other in jobs if other.id != report.job_id), "nothing of another member"
