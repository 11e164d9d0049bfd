"""Every diffusers family through the queue: a bare worker, tiny weights, and a file that anybody can open."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import EventName, JobRecord, JobState, Task
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import load_settings
from omnirt_tasks.validation import parse_request
from tests.support.job_system import JobSystem
from tests.support.media import frames_of, opened
from tests.support.processes import Processes
from tests.support.tiny.folders import TINY, save_tiny

FINISH_TIMEOUT_S = 90.0  # the first job of all imports the libraries, on a busy machine


@pytest.fixture(scope="module")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobSystem]:
    """A system with one bare worker, which serves every family."""
    folder = tmp_path_factory.mktemp("families")
    settings = load_settings(
        redis_url=redis_url,
        key_prefix=f"families{uuid.uuid4().hex[:8]}",
        data_dir=folder / "data",
        run_dir=folder / "run",
        model_folders={model: save_tiny(model, folder / "weights" / model) for model in TINY},
        torch_threads=1,
        heartbeat_s=0.3,
        grace_s=1.0,
    )
    queues = {f"cpu-{discover().find(model).queue}" for model in TINY}
    processes, system = Processes(), JobSystem(settings)
    try:
        processes.worker(settings, *sorted(queues))
        yield system
    finally:
        system.close()
        processes.stop_all()


def finished(system: JobSystem, model: str, **inputs: Any) -> JobRecord:
    """A job of the model's first task in the least size and three steps, once it is over."""
    body = {
        "task": next(iter(discover().find(model).tasks)),
        "model": model,
        "backend": "cpu",
        "inputs": {"prompt": "a red circle", **inputs},
        "config": {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 5, "dtype": "fp32"},
    }
    job_id = system.submission.submit(parse_request(body), owner="").record.id
    job = system.finished(job_id, timeout_s=FINISH_TIMEOUT_S)
    assert job.state is JobState.SUCCEEDED, job.error
    assert [event.data["step"] for event in steps_of(system, job)] == [1, 2, 3]
    return job


def steps_of(system: JobSystem, job: JobRecord) -> list[Any]:
    return [event for event in system.events(job.id, EventName.STAGE_PROGRESS) if event.stage != "load"]


def fetched(system: JobSystem, job: JobRecord, folder: Path) -> Path:
    """The job's only output, as it comes from the artifact storage."""
    assert job.result is not None
    (artifact,) = job.result.outputs
    target = folder / artifact.name
    system.artifacts.fetch(job.id, job.attempt, artifact.name, target)
    assert target.stat().st_size == artifact.size_bytes
    return target


@pytest.mark.parametrize("model", [model for model in TINY if Task.TEXT2IMAGE in discover().find(model).tasks])
def test_a_family_serves_a_picture_through_the_queue(system: JobSystem, tmp_path: Path, model: str) -> None:
    job = finished(system, model)

    picture = opened(fetched(system, job, tmp_path))
    assert (picture.format, picture.size) == ("PNG", (64, 64))
    assert job.execution_mode == discover().find(model).execution_mode


def test_a_family_serves_a_film_through_the_queue(system: JobSystem, tmp_path: Path) -> None:
    job = finished(system, "wan2.1-t2v-14b", num_frames=9, fps=8)

    film = frames_of(fetched(system, job, tmp_path))
    assert (len(film.frames), film.size, film.fps) == (9, (64, 64), 8)
    assert job.result is not None
    (artifact,) = job.result.outputs
    assert (artifact.mime, artifact.num_frames) == ("video/mp4", 9)
