"""A job is accepted whole, or refused with nothing queued."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omnirt_tasks.contract import (
    Artifact,
    ArtifactKind,
    ExecutionMode,
    GenerateResult,
    JobState,
    ModelAbility,
    RunReport,
    Task,
    WorkerCapability,
)
from omnirt_tasks.errors import (
    ArtifactNotFound,
    InsufficientMemory,
    OmnirtError,
    QueueFull,
    StoreUnavailable,
    UploadNotFound,
    ValidationFailed,
)
from omnirt_tasks.jobs.fleet import MemoryFleet
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.store import JobQuery, QueueDepth, Succeeded
from omnirt_tasks.registry import discover
from omnirt_tasks.routing import queues_served, worker_tags
from omnirt_tasks.submission import Submission
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import Door, parse_request

GIB = 2**30
SDXL: dict[str, object] = {"task": "text2image", "model": "sdxl-base-1.0", "inputs": {"prompt": "a cat"}}
SHAPES: dict[str, object] = {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a red circle"}}


class House:
    """A submission with everything around it in memory; `sent` are the messages."""

    def __init__(self, folder: Path, *, queue_limit: int = 10) -> None:
        self.sent: list[tuple[str, str]] = []
        self.broker_away = False
        self.store = MemoryJobStore()
        self.uploads = UploadStorage(folder.as_uri(), ttl_s=60, max_bytes=1_000_000, max_pixels=1_000_000)
        self.folder = folder
        self.fleet = MemoryFleet()
        self.door = Submission(
            store=self.store,
            catalog=discover(),
            fleet=self.fleet,
            uploads=self.uploads,
            send=self.send,
            door=Door(),
            queue_limit=queue_limit,
        )

    def send(self, job_id: str, queue: str) -> None:
        if self.broker_away:
            raise StoreUnavailable("The broker is away.")
        self.sent.append((job_id, queue))

    def submit(self, owner: str = "anna", model: str = "shapes", **body: Any) -> str:
        request = {"task": "text2image", "model": model, "inputs": {"prompt": "a red circle"}} | body
        return self.door.submit(parse_request(request), owner=owner).record.id

    def edit(self, image: str, owner: str = "anna") -> str:
        inputs = {"prompt": "a cat", "image": image}
        return self.submit(owner, "sdxl-base-1.0", task="image2image", inputs=inputs)

    def enter_worker(self, backend: str, *, budget_bytes: int, seconds_per_unit: float | None = None) -> None:
        """A worker of sdxl lives: its weights take 2 GiB in fp16 and 4 GiB in fp32, and a megapixel 1 GiB in fp16."""
        ability = ModelAbility(
            tasks=(Task.TEXT2IMAGE,),
            execution_mode=ExecutionMode.LEGACY_CALL,
            weights_bytes={"fp16": 2 * GIB, "fp32": 4 * GIB},
            working_bytes_per_pixel=1024,
            seconds_per_unit=seconds_per_unit,
        )
        device = f"{backend}:0"
        record = WorkerCapability(
            worker_id=f"{device}@host",
            backend=backend,
            device=device,
            queues=queues_served([f"{backend}-sdxl"], worker_tags((), device)),
            models=("sdxl-base-1.0",),
            memory_budget_bytes=budget_bytes,
            dtypes=("fp32", "fp16") if backend == "cuda" else ("fp32",),
            abilities={"sdxl-base-1.0": ability},
        )
        self.fleet.publish(record, ttl_ms=60_000)

    def nothing_was_queued(self) -> bool:
        stored = list(self.folder.glob("uploads/*"))
        return not self.sent and not stored and not self.store.page(JobQuery(owner="anna")).jobs

    def succeed(self, job_id: str) -> None:
        claim = self.store.claim(job_id, worker_id="w", lease_ttl_ms=10_000)
        assert claim is not None
        picture = Artifact(
            kind=ArtifactKind.IMAGE, name="image-0.png", index=0, path="", mime="image/png", size_bytes=1, sha256=""
        )
        report = RunReport(
            run_id="r", task=Task.TEXT2IMAGE, model="shapes", backend="cpu", job_id=job_id,
            execution_mode=ExecutionMode.LEGACY_CALL,
        )  # fmt: skip
        assert self.store.commit(claim.lease, Succeeded(GenerateResult(outputs=(picture,), metadata=report)))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def png(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, "PNG")
    return out.getvalue()


def test_an_accepted_job_has_its_record_and_its_message(house: House) -> None:
    job_id = house.submit()

    job = house.store.get(job_id)
    assert (job.record.state, job.owner, job.queue) == (JobState.QUEUED, "anna", "cpu-shapes")
    assert job.resolved.backend == "cpu"
    assert house.sent == [(job_id, "cpu-shapes")]


def test_a_job_whose_message_could_not_be_sent_is_accepted_all_the_same(house: House) -> None:
    house.broker_away = True

    assert house.store.get(house.submit()).record.state is JobState.QUEUED


def test_a_refused_job_leaves_nothing_behind(house: House) -> None:
    with pytest.raises(OmnirtError):
        house.submit(config={"width": 513})
    assert house.nothing_was_queued()


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    house = House(tmp_path, queue_limit=1)
    house.submit()

    with pytest.raises(QueueFull):
        house.submit()
    assert len(house.sent) == 1


def test_a_data_url_becomes_an_upload_and_stands_in_no_record(house: House) -> None:
    job = house.store.get(house.edit(data_url(png())))

    reference = job.resolved.inputs.image
    assert reference is not None
    assert reference.startswith("upload:")
    assert "base64" not in str(job.record.request)
    assert house.uploads.find("anna", reference.removeprefix("upload:")).mime == "image/png"


@pytest.mark.parametrize(
    "image",
    [data_url(b"no picture"), data_url(png(2_000)), data_url(b"RIFF\0\0\0\0WAVEfmt "), "data:image/png;base64,§"],
)
def test_a_picture_that_is_none_is_refused_with_its_place(house: House, image: str) -> None:
    with pytest.raises(OmnirtError) as caught:
        house.edit(image)

    assert caught.value.http_status in {413, 422}
    assert [problem.loc for problem in caught.value.details] == ["inputs.image"]
    assert house.nothing_was_queued()


def test_an_upload_is_found_by_its_owner_alone(house: House) -> None:
    upload = house.uploads.put("anna", io.BytesIO(png()))

    house.edit(f"upload:{upload.id}")
    with pytest.raises(UploadNotFound):
        house.edit(f"upload:{upload.id}", owner="bert")


def test_a_missing_reference_is_told_beside_what_else_is_wrong(house: House) -> None:
    inputs = {"prompt": "a cat", "image": "upload:nope"}

    with pytest.raises(ValidationFailed) as caught:
        house.submit(model="sdxl-base-1.0", task="image2image", inputs=inputs, config={"width": 513})

    assert {problem.loc for problem in caught.value.details} == {"inputs.image", "config.width"}


def test_an_earlier_output_is_an_input(house: House) -> None:
    job_id = house.submit()
    with pytest.raises(ArtifactNotFound):  # not before it has succeeded
        house.edit(f"artifact:{job_id}/image-0.png")
    house.succeed(job_id)

    house.edit(f"artifact:{job_id}/image-0.png")
    for image, owner in ((f"artifact:{job_id}/image-0.png", "bert"), (f"artifact:{job_id}/other.png", "anna")):
        with pytest.raises(ArtifactNotFound):
            house.edit(image, owner)


def test_only_the_queues_that_a_job_may_go_to_are_measured(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("cpu", "cuda"):
        queues = queues_served([f"{backend}-shapes"], ["a", "b"])
        house.fleet.publish(
            WorkerCapability(worker_id=backend, backend=backend, device="", queues=queues, models=("shapes",)),
            ttl_ms=60_000,
        )
    measured: list[str] = []

    def depth(queue: str) -> QueueDepth:
        measured.append(queue)
        return QueueDepth(0, 0)

    monkeypatch.setattr(house.store, "depth", depth)
    request = parse_request(SHAPES | {"tags": ["b"]})

    assert house.door.check(request, "anna").request is not None
    assert sorted(measured) == ["cpu-shapes+b", "cuda-shapes+b"]
    measured.clear()
    house.door.check(request.model_copy(update={"backend": "cpu"}), "anna")
    assert not measured


def test_a_refused_input_tells_its_remedy(house: House) -> None:
    with pytest.raises(UploadNotFound) as caught:
        house.edit("upload:nobody")

    assert caught.value.hint is not None
    assert caught.value.details[0].message == str(caught.value)


def test_a_check_tells_what_would_run_and_writes_nothing(house: House) -> None:
    request = parse_request(
        {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a"}, "config": {"preset": "low-vram"}}
    )

    resolution = house.door.check(request, "anna")

    assert resolution.request is not None
    assert (resolution.request.backend, resolution.request.config["dtype"]) == ("cpu", "fp32")
    assert resolution.request.warnings
    assert house.nothing_was_queued()


def test_what_no_live_worker_has_room_for_is_refused_by_check_and_submit_alike(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=2 * GIB)
    wish = parse_request(SDXL | {"config": {"width": 1024, "height": 1024}})

    told = house.door.check(wish, "anna")
    with pytest.raises(InsufficientMemory) as caught:
        house.door.submit(wish, owner="anna")

    assert told.request is None
    assert told.problems == caught.value.details
    assert "cuda:0" in caught.value.message
    assert house.nothing_was_queued()


def test_a_smaller_request_is_accepted_where_the_larger_was_refused(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=5 * GIB // 2)

    with pytest.raises(InsufficientMemory):
        house.submit(model="sdxl-base-1.0", config={"width": 1024, "height": 1024})
    house.submit(model="sdxl-base-1.0", config={"width": 512, "height": 1024})

    assert [queue for _, queue in house.sent] == ["cuda-sdxl"]


def test_a_job_goes_to_the_backend_that_has_room_for_it(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=2 * GIB)
    house.enter_worker("cpu", budget_bytes=64 * GIB)

    job = house.store.get(house.submit(model="sdxl-base-1.0"))

    assert (job.queue, job.resolved.backend, job.resolved.config["dtype"]) == ("cpu-sdxl", "cpu", "fp32")


def test_without_a_live_worker_nothing_is_too_large(house: House) -> None:
    house.submit(model="sdxl-base-1.0", config={"num_images_per_prompt": 16})

    assert [queue for _, queue in house.sent] == ["cuda-sdxl"]


def test_the_measured_times_of_the_workers_decide_where_both_have_room(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=64 * GIB, seconds_per_unit=0.1)
    house.enter_worker("cpu", budget_bytes=64 * GIB, seconds_per_unit=10.0)
    for _ in range(3):
        house.submit(model="sdxl-base-1.0", backend="cuda")
    house.submit(model="sdxl-base-1.0", backend="cpu")

    house.submit(model="sdxl-base-1.0")  # 0.3 s behind three, or 10 s behind one

    assert house.sent[-1][1] == "cuda-sdxl"


def test_a_wish_that_no_live_worker_can_fulfil_is_refused_with_its_place(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=64 * GIB)

    for config, place in (({"compile": True}, "config.compile"), ({"device": "cuda:1"}, "config.device")):
        told = house.door.check(parse_request(SDXL | {"config": config}), "anna")
        with pytest.raises(ValidationFailed) as caught:
            house.submit(model="sdxl-base-1.0", config=config)
        assert (
            [problem.loc for problem in told.problems] == [problem.loc for problem in caught.value.details] == [place]
        )
        assert "cuda:0" in str(caught.value), "what there is"
    assert house.nothing_was_queued()


def test_a_job_that_names_its_device_waits_where_that_device_alone_is_served(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=64 * GIB)

    job = house.store.get(house.submit(model="sdxl-base-1.0", config={"device": "cuda:0"}))

    assert (job.queue, job.resolved.backend) == ("cuda-sdxl+cuda-0", "cuda")
    assert job.resolved.config["device"] == "cuda:0"
    assert house.sent == [(job.record.id, "cuda-sdxl+cuda-0")]
