"""What ran a long job dies, device or worker: the next attempt goes on from the checkpoint that was kept."""

from collections.abc import Iterator

import psutil
import pytest

from omnirt_tasks.contract import Event, EventName, JobRecord, JobState
from omnirt_tasks.settings import Settings
from omnirt_tasks.validation import parse_request
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.waiting import eventually

DONE_S = 120.0
SHAPES_STEPS = 200
KEPT_EVERY = 50
PICTURES = 4


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    system = JobSystem(settings.model_copy(update={"placement": "process"}))
    yield system
    system.close()


def device_process(system: JobSystem) -> psutil.Process:
    """The process of the only worker's device."""
    (worker,) = system.fleet.live()
    children = psutil.Process(worker.pid).children(recursive=True)
    return next(child for child in children if "workers.device_child" in child.cmdline())


def of_attempt(system: JobSystem, job: JobRecord, attempt: int, name: EventName) -> list[Event]:
    """The job's events of this name, between the start of this attempt and that of the next."""
    told, current = [], 0
    for event in system.events(job.id):
        if event.event is EventName.JOB_STARTED:
            current += 1
        elif current == attempt and event.event is name:
            told.append(event)
    return told


def held_to_its_checkpoint(system: JobSystem, job: JobRecord) -> int:
    """Hold a job of two attempts to going on where the first's last checkpoint was; the step of it."""
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
    kept = of_attempt(system, job, 1, EventName.CHECKPOINT)[-1].data["step"]
    (resumed,) = of_attempt(system, job, 2, EventName.RESUMED)
    assert resumed.data["step"] == kept
    steps = [event for event in of_attempt(system, job, 2, EventName.STAGE_PROGRESS) if event.stage == "denoise"]
    assert steps[0].data["step"] == int(str(kept)) + 1, "the steps before are not told again"
    return int(str(kept))


def submit_shapes(system: JobSystem) -> str:
    body = {
        "task": "text2image",
        "model": "shapes",
        "backend": "cpu",
        "inputs": {"prompt": "a large red circle on a blue background"},
        "config": {
            "num_inference_steps": SHAPES_STEPS,
            "num_images_per_prompt": PICTURES,
            "scheduler": "euler-ancestral",
            "seed": 3,
        },
    }
    return system.submission.submit(parse_request(body), owner="").record.id


def pictures(system: JobSystem, job: JobRecord) -> list[bytes]:
    paths = [system.local_file(job, f"{index}.png") for index in range(PICTURES)]
    return [path.read_bytes() for path in paths if path is not None]


def test_pictures_whose_device_died_half_way_are_those_that_an_unbroken_run_draws(
    system: JobSystem, processes: Processes
) -> None:
    processes.worker(system.settings, "cpu-shapes")
    broken = submit_shapes(system)
    system.seen(broken, EventName.CHECKPOINT, DONE_S)

    device_process(system).kill()

    job = system.finished(broken, DONE_S)
    assert held_to_its_checkpoint(system, job) % KEPT_EVERY == 0
    unbroken = system.finished(submit_shapes(system), DONE_S)
    assert unbroken.attempt == 1
    assert len(pictures(system, unbroken)) == PICTURES
    assert pictures(system, job) == pictures(system, unbroken)


def test_a_job_whose_worker_was_killed_goes_on_at_another(system: JobSystem, processes: Processes) -> None:
    first = processes.worker(system.settings, STUB_QUEUE)
    job_id = system.submit(steps=60, step_ms=50, checkpoint_every_steps=5)
    system.seen(job_id, EventName.CHECKPOINT)

    first.kill()
    eventually(lambda: first.exit_code is not None)
    processes.worker(system.settings, STUB_QUEUE)

    job = system.finished(job_id, DONE_S)
    assert held_to_its_checkpoint(system, job) >= 5
    assert len(system.events(job_id, EventName.JOB_FINISHED)) == 1
