"""Requests from keyword arguments."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks import requests
from omnirt_tasks.contract import GenerateRequest, Task
from omnirt_tasks.errors import ValidationFailed
from omnirt_tasks.registry import discover
from omnirt_tasks.validation import Door, resolve

BUILDERS: list[tuple[Callable[..., GenerateRequest], Task, dict[str, Any]]] = [
    (requests.text2image, Task.TEXT2IMAGE, {"prompt": "a star"}),
    (requests.image2image, Task.IMAGE2IMAGE, {"image": "upload:1", "prompt": "a star"}),
    (requests.inpaint, Task.INPAINT, {"image": "upload:1", "mask": "upload:2", "prompt": "a star"}),
    (requests.edit, Task.EDIT, {"image": "upload:1", "prompt": "a star"}),
    (requests.text2video, Task.TEXT2VIDEO, {"prompt": "a star", "num_frames": 16, "fps": 8}),
    (requests.image2video, Task.IMAGE2VIDEO, {"image": "upload:1"}),
    (requests.audio2video, Task.AUDIO2VIDEO, {"audio": "upload:1", "image": "upload:2"}),
    (requests.text2audio, Task.TEXT2AUDIO, {"prompt": "hello", "reference_text": "hi"}),
    (requests.audio2text, Task.AUDIO2TEXT, {"audio": "upload:1"}),
]


@pytest.mark.parametrize(("build", "task", "inputs"), BUILDERS, ids=lambda value: str(getattr(value, "__name__", "")))
def test_each_task_has_a_function_whose_other_arguments_go_to_config(
    build: Callable[..., GenerateRequest], task: Task, inputs: dict[str, Any]
) -> None:
    request = build(model="m", preset="fast", seed=None, num_inference_steps=4, **inputs)

    assert request.task is task
    assert request.inputs == inputs
    assert request.config == {"preset": "fast", "seed": None, "num_inference_steps": 4}


def test_there_is_a_function_for_every_task() -> None:
    assert {task for _, task, _ in BUILDERS} == set(Task)


def test_fields_of_the_request_stay_fields() -> None:
    request = requests.text2image(
        model="m", prompt="p", backend="cpu", tags=["eu"], metadata={"order": "7"}, guidance_scale=3.5
    )

    assert (request.backend, request.tags, request.metadata) == ("cpu", ["eu"], {"order": "7"})
    assert request.config == {"guidance_scale": 3.5}


def test_an_input_that_is_none_counts_as_not_given_and_a_path_becomes_text(tmp_path: Path) -> None:
    request = requests.image2image(model="m", image=tmp_path / "cat.png", prompt="p", negative_prompt=None)

    assert request.inputs == {"image": str(tmp_path / "cat.png"), "prompt": "p"}


def test_a_wrong_type_is_refused_with_its_place() -> None:
    with pytest.raises(ValidationFailed) as caught:
        requests.text2image(model="m", prompt="p", tags="eu", backend="gpu")

    assert {problem.loc for problem in caught.value.details} == {"tags", "backend"}


@pytest.mark.parametrize("prompts", [["a", "b"], ("a", "b")], ids=["list", "tuple"])
def test_several_prompts_are_a_list_as_json_has_it(prompts: Sequence[str]) -> None:
    request = requests.text2image(model="shapes", prompt=prompts, priority="high")

    assert request.inputs == {"prompt": ["a", "b"]}
    assert request.priority == "high"
    assert resolve(request, discover(), door=Door()).unwrap()[0].inputs.prompt == ("a", "b")
