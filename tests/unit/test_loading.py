"""Which model a run needs, in which form: what makes two jobs share weights, and what does not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import ExecutionMode
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.errors import ModelFailed
from omnirt_tasks.registry import ModelSpec, discover
from omnirt_tasks.registry.spec import Option, OptionKind
from workers.backends import DeviceInfo
from workers.loading import ModelKey, Sharing, Shelf

DEVICE = DeviceInfo("cuda:0", "a card", None, ("fp32", "fp16"))
BASE: dict[str, Any] = {"dtype": "fp16", "num_inference_steps": 4, "width": 64, "height": 64, "compile": False}


@pytest.fixture
def spec() -> ModelSpec:
    return discover().find("sdxl-base-1.0")


def key(spec: ModelSpec, folder: Path, torch_device: str = "cuda:0", **config: Any) -> ModelKey:
    shelf = Shelf([spec], {spec.id: folder}, DEVICE, torch_device)
    return shelf.key(spec, shelf.load_request(spec, BASE | config))


@pytest.mark.parametrize(
    "other", [{"num_inference_steps": 9}, {"width": 128, "height": 512}, {"scheduler": "ddim"}, {"seed": 7}]
)
def test_jobs_that_differ_in_their_own_wishes_share_the_weights(
    spec: ModelSpec, tmp_path: Path, other: dict[str, Any]
) -> None:
    assert key(spec, tmp_path, **other) == key(spec, tmp_path)


@pytest.mark.parametrize("other", [{"dtype": "fp32"}, {"compile": True}, {"torch_device": "cuda:1"}])
def test_what_changes_the_weights_in_memory_keeps_jobs_apart(
    spec: ModelSpec, tmp_path: Path, other: dict[str, Any]
) -> None:
    assert key(spec, tmp_path, **other) != key(spec, tmp_path)


def test_another_folder_or_revision_is_another_model_and_another_name_of_the_folder_is_not(
    spec: ModelSpec, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (tmp_path / "link").symlink_to(weights)
    assert key(spec, weights) != key(spec, tmp_path)
    assert key(dataclasses.replace(spec, revision="v2"), weights) != key(spec, weights)
    assert key(spec, tmp_path / "link") == key(spec, weights)


def test_models_without_a_folder_are_told_apart_by_their_ids() -> None:
    stub = discover().find("stub")
    other = dataclasses.replace(stub, id="other")
    shelf = Shelf([stub, other], {}, DEVICE, "cpu")
    keys = [shelf.key(model, shelf.load_request(model, {})) for model in (stub, other)]
    assert keys[0] != keys[1]
    assert shelf.ids_loaded(keys[:1]) == ("stub",)


def test_a_model_is_loaded_first_in_its_own_dtype_or_in_one_that_the_device_can_do(
    spec: ModelSpec, tmp_path: Path
) -> None:
    for dtypes, loaded_in in ((("fp32", "fp16"), "fp16"), (("fp32", "bf16"), "fp32"), (("bf16",), "bf16")):
        shelf = Shelf([spec], {spec.id: tmp_path}, dataclasses.replace(DEVICE, dtypes=dtypes), "cpu")
        assert shelf.default_request(spec).dtype == loaded_in


def test_a_model_is_loaded_first_as_a_job_without_wishes_has_it() -> None:
    stub = discover().find("stub")
    task, its = next(iter(stub.tasks.items()))
    option = Option("devices", OptionKind.INTEGER, 2, "Devices.")
    compiled = Option("compile", OptionKind.BOOLEAN, True, "Compile.")
    own = dataclasses.replace(its, options={**its.options, "devices": option, "compile": compiled})
    spec = dataclasses.replace(stub, tasks={task: own})
    shelf = Shelf([spec], {}, DEVICE, "cpu")
    defaults: dict[str, Any] = {name: option.default for name, option in own.options.items()}

    first = shelf.default_request(spec)

    assert (first.devices, first.compile) == (2, True)
    assert shelf.key(spec, first) == shelf.key(spec, shelf.load_request(spec, defaults))


def test_a_dtype_that_the_device_cannot_do_is_refused_with_those_that_it_can(spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(ModelFailed, match="does not compute in bf16") as refused:
        key(spec, tmp_path, dtype="bf16")
    assert refused.value.hint == "Ask for the dtype fp32 or fp16."


def test_a_model_that_is_not_served_here_is_told_with_the_setting_that_would_help() -> None:
    with pytest.raises(ModelFailed, match="'sdxl-turbo'") as refused:
        Shelf([], {}, DEVICE, "cuda:0").spec("sdxl-turbo")
    assert "OMNIRT_MODEL_FOLDERS" in str(refused.value)


def test_a_models_ability_tells_whose_calls_are_shared_once_it_was_loaded_and_what_that_brought(
    spec: ModelSpec,
) -> None:
    shelf = Shelf([spec], {}, DEVICE, "cpu")
    measure = ChunkMeasure(module="unet", shape="512x512 fp16", limit=4, gain=1.5, step_ms={"1": 10.0})

    def told() -> tuple[object, ...]:
        ability = shelf.abilities(lambda _: None, lambda model: (measure,) if model == spec.id else ())[spec.id]
        return ability.chunk_classes, ability.unchunked, ability.chunks

    assert told() == ((), None, (measure,))
    shelf.note_sharing(spec, Sharing(("UNet2DConditionModel",)))
    assert told() == (("UNet2DConditionModel",), None, (measure,))
    shelf.note_sharing(spec, Sharing(unchunked="Its unet takes an argument that is not known: 'depth'."))
    assert told() == ((), "Its unet takes an argument that is not known: 'depth'.", (measure,))


@pytest.mark.parametrize("mode", [ExecutionMode.SUBPROCESS, ExecutionMode.PERSISTENT_WORKER])
def test_a_model_whose_jobs_hold_the_device_says_that_it_shares_nothing(spec: ModelSpec, mode: ExecutionMode) -> None:
    shelf = Shelf([dataclasses.replace(spec, execution_mode=mode)], {}, DEVICE, "cpu")
    assert shelf.abilities(lambda _: None)[spec.id].unchunked is not None
