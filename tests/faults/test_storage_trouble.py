"""The storage is full, read-only or broken: the job or the upload fails and says why, and the system serves on."""

import base64
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import EventName, JobRecord, JobState
from omnirt_tasks.errors import StorageError
from omnirt_tasks.settings import Settings
from omnirt_tasks.uploads import UploadStorage
from tests.support.disks import full, read_only, replaced_by_a_file, small_disk
from tests.support.files import files_in
from tests.support.gateway import Gateway, code_of, png, running_gateway
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.waiting import eventually

DISK_BYTES = 1024 * 1024
Trouble = Callable[[Path], AbstractContextManager[None]]

troubles = pytest.mark.parametrize("trouble", [full, read_only, replaced_by_a_file])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        yield disk


@pytest.fixture
def settings(settings: Settings, disk: Path) -> Settings:
    return settings.model_copy(update={"data_dir": disk, "retry_backoff_s": 0.05, "retries_max": 1})


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    system = JobSystem(settings)
    yield system
    system.close()


@pytest.fixture
def gateway(settings: Settings) -> Iterator[Gateway]:
    with running_gateway(settings) as gateway:
        yield gateway


def assert_whole(system: JobSystem, job: JobRecord) -> None:
    """The job has its picture, every byte of it."""
    assert job.state is JobState.SUCCEEDED, job.error
    assert job.result is not None
    (output,) = job.result.outputs
    file = system.local_file(job, output.name)
    assert file is not None
    assert hashlib.sha256(file.read_bytes()).hexdigest() == output.sha256


def pictures(disk: Path, job: JobRecord) -> list[Path]:
    return [file for file in files_in(disk / "jobs" / job.id) if file.suffix == ".png"]


@troubles
def test_a_job_whose_picture_cannot_be_stored_fails_and_the_worker_goes_on(
    system: JobSystem, processes: Processes, disk: Path, trouble: Trouble
) -> None:
    worker = processes.worker(system.settings, STUB_QUEUE)
    assert_whole(system, system.finished(system.submit()))

    with trouble(disk):
        job = system.finished(system.submit())

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "storage_error"
    assert str(disk) not in f"{job.error.message} {job.error.hint}"
    eventually(lambda: not pictures(disk, job), told=lambda: str(pictures(disk, job)))
    assert len(system.events(job.id, EventName.JOB_STARTED)) == 2, "it is tried again, as often as the setting says"
    assert_whole(system, system.finished(system.submit()))
    assert worker.exit_code is None


@troubles
def test_a_job_succeeds_when_the_storage_is_back_for_its_next_try(
    settings: Settings, system: JobSystem, processes: Processes, disk: Path, trouble: Trouble
) -> None:
    patient = settings.model_copy(update={"retry_backoff_s": 1.0, "retries_max": 3})
    processes.worker(patient, STUB_QUEUE)
    assert_whole(system, system.finished(system.submit()))

    with trouble(disk):
        job_id = system.submit()
        system.seen(job_id, EventName.JOB_REQUEUED)

    job = system.finished(job_id)
    assert_whole(system, job)
    assert job.attempt > 1
    assert len(pictures(disk, job)) == 1


@troubles
def test_an_upload_that_cannot_be_stored_is_answered_503_and_leaves_nothing(
    gateway: Gateway, disk: Path, trouble: Trouble
) -> None:
    assert send_upload(gateway).status_code == 201
    before = uploads(disk)

    with trouble(disk):
        answer = send_upload(gateway)

    assert (answer.status_code, code_of(answer)) == (503, "storage_error")
    assert str(disk) not in answer.text
    assert uploads(disk) == before
    assert send_upload(gateway).status_code == 201
    assert len(uploads(disk)) == len(before) + 2


@troubles
def test_a_job_whose_input_cannot_be_stored_is_not_accepted(gateway: Gateway, disk: Path, trouble: Trouble) -> None:
    (disk / "uploads").mkdir()
    picture = f"data:image/png;base64,{base64.b64encode(png(64, 64)).decode()}"
    request = {"task": "image2image", "model": "sd15", "inputs": {"prompt": "a circle", "image": picture}}

    with trouble(disk):
        answer = gateway.http.post("/v1/jobs", json=request)

    assert (answer.status_code, code_of(answer)) == (503, "storage_error")
    assert not uploads(disk)
    assert gateway.http.get("/v1/jobs").json()["data"] == []
    assert gateway.http.post("/v1/jobs", json=request).status_code == 202


def test_what_fits_in_part_only_leaves_nothing_behind(disk: Path, tmp_path: Path) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    for file in files:
        file.write_bytes(bytes(DISK_BYTES * 2 // 3))
    artifacts = ArtifactStorage(disk.as_uri())
    kept = UploadStorage(disk.as_uri(), ttl_s=60, max_bytes=10 * DISK_BYTES, max_pixels=10**6)
    recording = b"RIFF\0\0\0\0WAVEfmt " + bytes(2 * DISK_BYTES)

    with pytest.raises(StorageError):
        artifacts.publish("job", 1, files)
    with pytest.raises(StorageError):
        kept.put("anna", io.BytesIO(recording))
    artifacts.publish("job", 2, files[:1])
    with pytest.raises(StorageError):
        artifacts.keep_checkpoint("job", 2, files[1])

    assert [file.relative_to(disk) for file in files_in(disk)] == [Path("jobs/job/2/first")]


def send_upload(gateway: Gateway) -> httpx.Response:
    return gateway.http.post("/v1/uploads", content=png(), headers={"Content-Type": "application/octet-stream"})


def uploads(disk: Path) -> list[str]:
    return sorted(path.name for path in (disk / "uploads").iterdir())
