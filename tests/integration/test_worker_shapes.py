"""A bare worker that is told nothing at all, with a model that draws."""

import sys
from collections.abc import Iterator

import pytest

from omnirt_tasks.contract import EventName, JobState
from omnirt_tasks.settings import Settings
from omnirt_tasks.validation import parse_request
from tests.support.job_system import JobSystem
from tests.support.processes import Processes, environment
from tests.support.waiting import eventually


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    system = JobSystem(settings)
    yield system
    system.close()


def test_a_worker_without_queues_serves_the_best_that_its_host_has(system: JobSystem, processes: Processes) -> None:
    command = [sys.executable, "-m", "celery", "-A", "omnirt_tasks", "worker"]
    worker = processes.start("worker", command, env=environment(system.settings))
    (alive,) = eventually(system.fleet.live, 45, told=lambda: "\n".join(worker.last_lines))
    assert f"{alive.backend}-shapes" in alive.queues
    body = {
        "task": "text2image",
        "model": "shapes",
        "inputs": {"prompt": "a large red circle on a blue background"},
        "config": {"num_inference_steps": 10, "seed": 3},
    }

    job = system.finished(system.submission.submit(parse_request(body), owner="").record.id, timeout_s=60)

    assert job.state is JobState.SUCCEEDED, job.error
    assert job.result is not None
    told = system.events(job.id, EventName.STAGE_PROGRESS)
    assert [event.data["step"] for event in told if event.stage == "denoise"] == list(range(1, 11))
    loaded = [event.data["module"] for event in told if event.stage == "load"]
    assert sorted(map(str, loaded)) == ["text_encoder", "text_encoder_2", "unet", "vae"], "its loading is told by parts"
    (again,) = eventually(lambda: [one for one in system.fleet.live() if one.loaded], 5)
    assert again.loaded == ("shapes",)
