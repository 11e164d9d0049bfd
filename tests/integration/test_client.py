"""The Python client against a real gateway and a real worker."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from omnirt_tasks import requests
from omnirt_tasks.client import Client
from omnirt_tasks.contract import CancelOutcome, EventName, GenerateRequest, JobState
from omnirt_tasks.embedded import free_port
from omnirt_tasks.errors import (
    GatewayUnreachable,
    JobCancelled,
    JobNotFound,
    JobTimeout,
    ModelFailed,
    ModelNotFound,
    StorageError,
    Unauthorized,
    UnsupportedMediaType,
    ValidationFailed,
)
from omnirt_tasks.settings import Settings
from tests.support.processes import Processes, small_system
from tests.support.waiting import eventually

QUEUE = "cpu-stub-stub"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a gateway with a stub worker behind it; all tests here share them."""
    folder = tmp_path_factory.mktemp("system")
    with small_system(folder, QUEUE, heartbeat_s=0.3) as url, Client(url) as client:
        yield client


def stub(prompt: str = "a cat", **config: object) -> GenerateRequest:
    return requests.text2image(model="stub", prompt=prompt, num_inference_steps=4, seed=7, **config)


def test_a_job_from_request_to_picture(system: Client, tmp_path: Path) -> None:
    job = system.submit(stub())
    events = list(system.events(job.id))
    done = system.wait(job.id, timeout_s=10)
    files = system.download_all(done, tmp_path)

    assert done.state is JobState.SUCCEEDED
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[-1].event is EventName.JOB_FINISHED
    assert [event.data["step"] for event in events if event.event is EventName.STAGE_PROGRESS] == [1, 2, 3, 4]
    assert done.result is not None
    (artifact,) = done.result.outputs
    assert hashlib.sha256(files[0].read_bytes()).hexdigest() == artifact.sha256
    with Image.open(files[0]) as picture:
        assert picture.size == (artifact.width, artifact.height)
    assert [file.name for file in tmp_path.iterdir()] == [artifact.name]


def test_generate_returns_the_result_and_raises_the_job_s_own_error(system: Client) -> None:
    assert system.generate(stub(), timeout_s=20).outputs[0].seed == 7
    with pytest.raises(ModelFailed):
        system.generate(stub(fail_at_step=2), timeout_s=20)


def test_events_begin_after_the_number_asked_for(system: Client) -> None:
    job = system.submit(stub())
    whole = list(system.events(job.id))

    assert list(system.events(job.id, after=3)) == whole[3:]
    assert list(system.events(job.id, after=whole[-1].seq)) == []


def test_a_wait_that_is_too_short_is_a_timeout_and_the_job_goes_on(system: Client) -> None:
    job = system.submit(stub(step_ms=300))

    with pytest.raises(JobTimeout):
        system.wait(job.id, timeout_s=0.3)

    assert system.wait(job.id, timeout_s=20).state is JobState.SUCCEEDED


def test_a_cancelled_job_ends_and_says_so(system: Client) -> None:
    job = system.submit(stub(step_ms=500))
    eventually(lambda: system.job(job.id).state is JobState.RUNNING)

    assert system.cancel(job.id) is CancelOutcome.REQUESTED
    assert system.wait(job.id, timeout_s=20).state is JobState.CANCELLED
    assert system.cancel(job.id) is CancelOutcome.ALREADY_FINISHED
    with pytest.raises(JobCancelled):
        system.download_all(system.job(job.id), "out")


def test_a_purged_job_is_gone(system: Client) -> None:
    job = system.submit(stub())
    system.wait(job.id, timeout_s=20)

    system.purge(job.id)

    with pytest.raises(JobNotFound):
        system.job(job.id)


def test_jobs_are_listed_newest_first_over_many_pages(system: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnirt_tasks.client.PAGE_JOBS", 2)
    ids = [system.submit(stub()).id for _ in range(5)]
    for job_id in ids:
        system.wait(job_id, timeout_s=20)

    found = [job.id for job in system.jobs(state=JobState.SUCCEEDED, model="stub")]

    assert found[:5] == ids[::-1]
    assert len(found) == len(set(found))


def test_refused_requests_raise_what_the_gateway_says(system: Client) -> None:
    with pytest.raises(ModelNotFound, match="stub"):
        system.submit(requests.text2image(model="stubb", prompt="x"))
    with pytest.raises(ValidationFailed) as caught:
        system.submit(requests.text2image(model="stub", prompt="x", width=99, stepz=1))

    assert {problem.loc for problem in caught.value.details} == {"config.width", "config.stepz"}


def test_validate_tells_without_queueing(system: Client) -> None:
    good = system.validate(stub())
    bad = system.validate(stub(width=99))

    assert good.request is not None
    assert good.request.config["seed"] == 7
    assert (bad.request, [problem.loc for problem in bad.problems]) == (None, ["config.width"])


def test_models_and_queues_are_told(system: Client) -> None:
    assert "stub" in {model["id"] for model in system.models()}
    assert {model["id"] for model in system.models(tier="core")} == {"shapes"}
    assert system.ready().queues[QUEUE].workers == 1


def test_a_local_file_is_uploaded_first(system: Client, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    request = requests.image2image(model="sdxl-base-1.0", image=tmp_path / "red.png", prompt="x", backend="cuda")

    job = system.submit(request)
    system.cancel(job.id)

    inputs = job.request["inputs"]
    assert isinstance(inputs, dict)
    assert str(inputs["image"]).startswith("upload:")


def test_a_file_that_is_not_there_and_one_that_is_no_picture_are_refused(system: Client, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValidationFailed, match="neither a file here"):
        system.submit(requests.image2image(model="sdxl-base-1.0", image="no.png", prompt="x"))
    with pytest.raises(UnsupportedMediaType):
        system.upload(tmp_path / "words.png")


def test_bytes_with_a_wrong_sum_are_not_kept(system: Client, tmp_path: Path) -> None:
    (artifact,) = system.generate(stub(), timeout_s=20).outputs

    with pytest.raises(StorageError, match="checksum"):
        system.download(artifact.model_copy(update={"sha256": "0" * 64}), tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_an_output_elsewhere_is_not_fetched_with_our_key(system: Client, tmp_path: Path) -> None:
    (artifact,) = system.generate(stub(), timeout_s=20).outputs

    with pytest.raises(StorageError, match="no address"):
        system.download(artifact.model_copy(update={"path": "http://127.0.0.1:9/v1/jobs/x"}), tmp_path)


def test_nothing_at_the_url_is_told_at_once() -> None:
    with (
        Client(f"http://127.0.0.1:{free_port()}") as client,
        pytest.raises(GatewayUnreachable, match="No gateway answers"),
    ):
        client.ready()
    with Client("no url at all") as client, pytest.raises(GatewayUnreachable):
        client.ready()


def test_a_gateway_with_keys_takes_the_right_one_alone(
    settings: Settings, processes: Processes, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("me:right-key-right-key-right-key\n")
    keys.chmod(0o600)
    _, url = processes.gateway(settings.model_copy(update={"api_keys_file": keys}))

    with Client(url, "right-key-right-key-right-key") as client:
        assert client.models()
    for wrong in (None, "wrong-key"):
        with Client(url, wrong) as client, pytest.raises(Unauthorized):
            client.models()


def test_events_go_on_where_they_broke_when_the_gateway_is_killed_and_comes_back(
    settings: Settings, processes: Processes
) -> None:
    processes.worker(settings, QUEUE)
    settings = settings.model_copy(update={"port": free_port()})
    gateway, url = processes.gateway(settings)
    with Client(url) as client:
        job = client.submit(stub(step_ms=400))
        seen: list[int] = []
        for event in client.events(job.id):
            seen.append(event.seq)
            if event.event is EventName.STAGE_PROGRESS and event.data["step"] == 1:
                gateway.kill()
                assert gateway.wait(10)
                processes.gateway(settings)

        assert seen == list(range(1, len(seen) + 1))
        assert client.job(job.id).state is JobState.SUCCEEDED


def test_events_give_up_when_the_gateway_stays_away(settings: Settings, processes: Processes) -> None:
    gateway, url = processes.gateway(settings)
    with Client(url, reconnect_s=0.5) as client:
        job = client.submit(stub())
        events = client.events(job.id)
        assert next(events).event is EventName.JOB_ENQUEUED

        gateway.kill()

        with pytest.raises(GatewayUnreachable):
            next(events)
