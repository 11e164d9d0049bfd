"""A whole system whose artifacts and uploads lie in a bucket of a real S3 server."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from omnirt_tasks import requests
from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.client import Client
from omnirt_tasks.contract import JobState
from omnirt_tasks.errors import StorageError
from omnirt_tasks.settings import Settings
from omnirt_tasks.storage import open_filesystem
from omnirt_tasks.stores import open_stores
from tests.support.gateway import Gateway, png, running_gateway
from tests.support.job_system import STUB_QUEUE
from tests.support.processes import Processes, free_port
from tests.support.s3 import S3Server, forget_connections, own_s3
from tests.support.waiting import eventually

JOB_S = 30.0


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with own_s3() as server:
        yield server


@pytest.fixture
def url(s3: S3Server) -> str:
    return f"{s3.bucket()}/omnirt"


@pytest.fixture
def settings(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"artifact_url": url})


@pytest.fixture
def gateway(settings: Settings) -> Iterator[Gateway]:
    with running_gateway(settings) as gateway:
        yield gateway


def in_bucket(url: str) -> list[str]:
    fs, root = open_filesystem(url)
    return sorted(str(path).removeprefix(f"{root}/") for path in fs.find(root))


def test_a_job_runs_through_a_bucket_and_a_purge_leaves_nothing_in_it(
    settings: Settings, gateway: Gateway, processes: Processes, url: str, tmp_path: Path
) -> None:
    processes.worker(settings, STUB_QUEUE)
    with Client(gateway.url) as client:
        job = client.wait(client.submit(requests.text2image(model="stub", prompt="a red circle")).id, JOB_S)
        assert job.state is JobState.SUCCEEDED, job.error
        assert job.result is not None
        (output,) = job.result.outputs

        whole = client.download(output, tmp_path).read_bytes()
        part = gateway.http.get(output.path, headers={"Range": f"bytes=4-{len(whole) - 3}"})

        assert hashlib.sha256(whole).hexdigest() == output.sha256
        assert (part.status_code, part.content) == (206, whole[4:-2])
        assert in_bucket(url) == [f"jobs/{job.id}/1/{output.name}"]
        client.purge(job.id)
    assert not in_bucket(url)


def test_an_upload_is_kept_in_the_bucket_until_its_time_is_over(settings: Settings, url: str) -> None:
    hasty = settings.model_copy(update={"upload_ttl_s": 0.5})
    with running_gateway(hasty) as gateway:
        answer = gateway.http.post("/v1/uploads", content=png(), headers={"Content-Type": "application/octet-stream"})
        assert answer.status_code == 201, answer.text
        upload = answer.json()["id"]
        assert in_bucket(url) == [f"uploads/{upload}.bin", f"uploads/{upload}.json"]
    stores = open_stores(hasty)
    try:
        eventually(stores.uploads.sweep)
    finally:
        stores.close()
    assert not in_bucket(url)


def test_a_job_of_a_bucket_that_is_gone_fails_with_storage_error_and_the_worker_goes_on(
    settings: Settings, s3: S3Server, gateway: Gateway, processes: Processes
) -> None:
    worker = processes.worker(settings.model_copy(update={"retries_max": 0}), STUB_QUEUE)
    bucket = f"{s3.endpoint}/{str(settings.artifact_url).removeprefix('s3://').partition('/')[0]}"
    httpx.delete(bucket).raise_for_status()
    with Client(gateway.url) as client:
        request = requests.text2image(model="stub", prompt="a red circle")
        job = client.wait(client.submit(request).id, JOB_S)
        assert (job.state, job.error and job.error.code) == (JobState.FAILED, "storage_error")

        httpx.put(bucket).raise_for_status()

        assert client.wait(client.submit(request).id, JOB_S).state is JobState.SUCCEEDED
    assert worker.exit_code is None


@pytest.fixture
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An endpoint that nobody listens on."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_connections()
    yield
    forget_connections()


def test_a_server_that_is_away_is_a_storage_error(nobody_there: None, tmp_path: Path) -> None:
    picture = tmp_path / "0.png"
    picture.write_bytes(png())
    away = ArtifactStorage("s3://away/path")
    for call in (lambda: away.publish("job", 1, [picture]), lambda: away.stat("job", 1, "0.png")):
        with pytest.raises(StorageError):
            call()
