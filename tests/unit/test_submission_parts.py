"""A job larger than a chunk is accepted whole, as parts with a message each."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from omnirt_tasks.contract import JobState, Priority
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.errors import OmnirtError
from omnirt_tasks.jobs.values import StoredJob, WakeUp
from omnirt_tasks.submission import request_again
from tests.support.submission import GIB, House, png


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def wake_ups_of_parts(job: StoredJob, count: int, priority: Priority = Priority.NORMAL) -> list[WakeUp]:
    return [WakeUp(f"{job.record.id}.{number}", job.queue, priority) for number in range(count)]


def measured(limit: int, shape: str = "64x64 fp32", module: str = "unet") -> ChunkMeasure:
    return ChunkMeasure(module=module, shape=shape, limit=limit, gain=1.0, step_ms={"1": 1.0, str(2 * limit): 2.0})


def test_a_job_larger_than_a_chunk_is_split_and_has_a_message_for_each_part(house: House) -> None:
    job = house.store.get(house.submit(config={"num_images_per_prompt": 10, "seed": 40}))

    assert house.sent == wake_ups_of_parts(job, 3)
    parts = [house.store.get(sent.job_id) for sent in house.sent]
    assert [part.resolved.config["num_images_per_prompt"] for part in parts] == [4, 3, 3]
    assert [part.resolved.config["seed"] for part in parts] == [40, 44, 47]
    assert [part.part.first_output for part in parts if part.part] == [0, 4, 7]
    assert job.resolved.config["num_images_per_prompt"] == 10, "the job is the whole one"


def test_a_list_of_prompts_is_split_in_order(house: House) -> None:
    job = house.store.get(house.submit(inputs={"prompt": list("abcdef")}, config={"seed": 7}))

    parts = [house.store.get(sent.job_id).resolved for sent in house.sent]
    assert [part.inputs.prompt for part in parts] == [("a", "b", "c"), ("d", "e", "f")]
    assert [part.config["seed"] for part in parts] == [7, 10]
    assert job.resolved.inputs.prompt == tuple("abcdef")


def test_a_job_of_one_chunk_is_not_split(house: House) -> None:
    job_id = house.submit(config={"num_images_per_prompt": 4})

    assert house.sent == [WakeUp(job_id, "cpu-shapes")]


def test_pictures_of_another_task_are_not_split(house: House) -> None:
    reference = house.uploads.put("anna", io.BytesIO(png())).id
    inputs = {"prompt": "a cat", "image": f"upload:{reference}"}

    job_id = house.submit(
        model="sdxl-base-1.0", task="image2image", inputs=inputs, config={"num_images_per_prompt": 16}
    )

    assert house.sent == [WakeUp(job_id, "cuda-sdxl")]


@pytest.mark.parametrize(
    ("limits", "max_batch_size", "parts"),
    [
        ((), None, 4),
        ((16,), None, 2),
        ((64,), None, 1),
        ((64, 16), None, 2),  # the worker that shares least counts: any of them may take a part
        ((1,), None, 16),
        ((16,), 16, 2),
        ((16,), 4, 4),
        ((), 1, 16),
    ],
)
def test_parts_are_as_large_as_what_pays_on_the_workers_of_the_queue(
    house: House, limits: tuple[int, ...], max_batch_size: int | None, parts: int
) -> None:
    for number, limit in enumerate(limits):
        house.enter_shapes_worker(
            str(number), measured(limit), measured(1, shape="512x512 fp32"), measured(1, module="vae.decode")
        )
    house.door = replace(house.door, max_batch_size=max_batch_size)

    house.submit(config={"num_images_per_prompt": 16})

    assert len(house.sent) == parts


def test_a_job_that_no_device_holds_at_once_runs_in_parts_that_they_do(house: House) -> None:
    house.enter_worker("cuda", budget_bytes=4 * GIB)  # 2 for the model, 1 for each picture

    house.submit(model="sdxl-base-1.0", config={"width": 1024, "height": 1024, "num_images_per_prompt": 6})

    parts = [house.store.get(sent.job_id).resolved.config["num_images_per_prompt"] for sent in house.sent]
    assert parts == [2, 2, 2]


@pytest.mark.parametrize("priority", list(Priority))
def test_messages_have_the_priority_of_their_job(house: House, priority: Priority) -> None:
    whole = house.store.get(house.submit(priority=priority))
    split = house.store.get(house.submit(priority=priority, config={"num_images_per_prompt": 8}))

    assert house.sent == [WakeUp(whole.record.id, whole.queue, priority), *wake_ups_of_parts(split, 2, priority)]
    assert whole.record.priority is split.record.priority is priority


def test_parts_whose_messages_could_not_be_sent_are_accepted_all_the_same(house: House) -> None:
    house.broker_away = True

    job = house.store.get(house.submit(config={"num_images_per_prompt": 8}))

    assert job.record.state is JobState.QUEUED
    assert not house.sent
    assert len(job.wake_ups) == 2


def test_a_part_is_no_input(house: House) -> None:
    job_id = house.submit(config={"num_images_per_prompt": 8})

    with pytest.raises(OmnirtError):
        house.edit(f"artifact:{job_id}.0/0.png")


def test_a_split_job_is_made_again_with_its_list_and_its_seed(house: House) -> None:
    job = house.store.get(house.submit(inputs={"prompt": list("abcde")}))

    again = request_again(job)

    assert again.inputs["prompt"] == list("abcde")
    assert again.config["seed"] == job.resolved.config["seed"]
