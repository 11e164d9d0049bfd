"""A job is accepted whole, or refused with nothing queued."""

import io
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import JobState, WorkerCapability
from omnirt_tasks.errors import (
    ArtifactNotFound,
    InsufficientMemory,
    OmnirtError,
    QueueFull,
    StorageError,
    StoreUnavailable,
    UploadNotFound,
    ValidationFailed,
)
from omnirt_tasks.jobs.values import QueueDepth, WakeUp
from omnirt_tasks.routing import queues_served
from omnirt_tasks.submission import request_again
from omnirt_tasks.validation import parse_request
from tests.support.submission import GIB, SDXL, SHAPES, House, data_url, png


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_an_accepted_job_has_its_record_and_its_message(house: House) -> None:
    job_id = house.submit()

    job = house.store.get(job_id)
    assert (job.record.state, job.owner, job.queue) == (JobState.QUEUED, "anna", "cpu-shapes")
    assert job.resolved.backend == "cpu"
    assert house.sent == [WakeUp(job_id, "cpu-shapes")]


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

    assert [sent.queue for sent in house.sent] == ["cuda-sdxl"]


def test_a_job_goes_to_the_backend_that_has_room_for_it(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=2 * GIB)
    house.enter_worker("cpu", budget_bytes=64 * GIB)

    job = house.store.get(house.submit(model="sdxl-base-1.0"))

    assert (job.queue, job.resolved.backend, job.resolved.config["dtype"]) == ("cpu-sdxl", "cpu", "fp32")


def test_without_a_live_worker_nothing_is_too_large(house: House) -> None:
    house.submit(model="sdxl-base-1.0", config={"num_images_per_prompt": 16})

    assert {sent.queue for sent in house.sent} == {"cuda-sdxl"}


def test_the_measured_times_of_the_workers_decide_where_both_have_room(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=64 * GIB, seconds_per_unit=0.1)
    house.enter_worker("cpu", budget_bytes=64 * GIB, seconds_per_unit=10.0)
    for _ in range(3):
        house.submit(model="sdxl-base-1.0", backend="cuda")
    house.submit(model="sdxl-base-1.0", backend="cpu")

    house.submit(model="sdxl-base-1.0")  # 0.3 s behind three, or 10 s behind one

    assert house.sent[-1].queue == "cuda-sdxl"


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
    assert house.sent == [WakeUp(job.record.id, "cuda-sdxl+cuda-0")]


def test_a_job_that_names_what_another_brought_has_a_copy_of_its_own(house: House) -> None:
    first = house.store.get(house.edit(data_url(png())))
    mine = house.uploads.put("anna", io.BytesIO(png()))

    again = house.store.get(house.edit(str(first.resolved.inputs.image)))
    plain = house.store.get(house.edit(f"upload:{mine.id}"))

    assert again.resolved.inputs.image != first.resolved.inputs.image
    house.uploads.remove_inputs(first.record.id, first.resolved.inputs)
    house.uploads.remove_inputs(plain.record.id, plain.resolved.inputs)
    assert house.uploads.find("anna", str(again.resolved.inputs.image).removeprefix("upload:")).mime == "image/png"
    assert house.uploads.find("anna", mine.id) == mine, "what the caller uploaded himself is his"
    with pytest.raises(UploadNotFound):
        house.uploads.find("anna", str(first.resolved.inputs.image).removeprefix("upload:"))


def test_a_job_again_has_the_seed_that_was_drawn_for_it_and_the_inputs_that_were_kept(house: House) -> None:
    image = data_url(png())
    inputs = {"prompt": "a cat", "image": image}
    first = house.store.get(
        house.submit(model="sdxl-base-1.0", task="image2image", inputs=inputs, tags=["a"], deadline_s=60)
    )

    again = house.store.get(house.door.submit(request_again(first), owner="anna").record.id)

    assert again.record.id != first.record.id
    assert again.resolved.config == first.resolved.config
    assert again.resolved.inputs.prompt == first.resolved.inputs.prompt
    assert again.resolved.inputs.image is not None
    assert again.resolved.config["seed"] is not None
    assert (again.resolved.tags, again.resolved.deadline_s) == (("a",), 60.0)


@pytest.mark.parametrize("written", [False, True], ids=["not written", "written, and the answer lost"])
def test_the_inputs_of_a_submit_that_the_store_stopped_stay_only_where_there_is_a_job(
    house: House, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    create = house.store.create

    def stopped(*given: Any, **more: Any) -> None:
        if written:
            create(*given, **more)
        raise StoreUnavailable("The store is full.")

    monkeypatch.setattr(house.store, "create", stopped)
    with pytest.raises(StoreUnavailable):
        house.edit(data_url(png()))

    assert len(list(house.folder.glob("uploads/*.bin"))) == written


def test_the_inputs_of_a_submit_stay_where_nobody_can_say_whether_there_is_a_job(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("The store is away.")

    for call in ("create", "get"):
        monkeypatch.setattr(house.store, call, away)
    with pytest.raises(StoreUnavailable):
        house.edit(data_url(png()))

    assert len(list(house.folder.glob("uploads/*.bin"))) == 1


def test_where_the_storage_takes_one_of_two_inputs_neither_stays(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    put, kept = house.uploads.put, 0

    def full_after_one(*given: Any, **more: Any) -> Any:
        nonlocal kept
        if kept:
            raise StorageError("The disk is full.")
        kept += 1
        return put(*given, **more)

    monkeypatch.setattr(house.uploads, "put", full_after_one)
    inputs = {"prompt": "a cat", "image": data_url(png()), "mask": data_url(png())}
    with pytest.raises(StorageError):
        house.submit(model="sdxl-base-1.0", task="inpaint", inputs=inputs)

    assert kept == 1
    assert not list(house.folder.glob("uploads/*"))
