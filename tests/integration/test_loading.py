"""Loading a folder: part by part, whole or not at all, and never with code of its own."""

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import Task
from omnirt_tasks.errors import ConfigurationError, ModelFailed, OmnirtError
from omnirt_tasks.registry import LoadRequest
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.weight_files import UnsoundWeights, count_tensors
from tests.support.tiny_models import save_tiny_sdxl

CLASSES = {
    Task.TEXT2IMAGE: "StableDiffusionXLPipeline",
    Task.IMAGE2IMAGE: "StableDiffusionXLImg2ImgPipeline",
    Task.INPAINT: "StableDiffusionXLInpaintPipeline",
}
HEAVY = ["text_encoder", "text_encoder_2", "unet", "vae"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_sdxl(tmp_path / "weights")


def request(folder: Path) -> LoadRequest:
    return LoadRequest(folder, "cpu", "fp32")


def change_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_each_heavy_part_is_told_as_it_is_loaded(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    load_diffusers(CLASSES, dataclasses.replace(request(folder), loaded_part=lambda *part: told.append(part)))
    assert sorted(name for name, _, _ in told) == HEAVY
    assert [(done, total) for _, done, total in told] == [(done, 4) for done in range(1, 5)]


def test_the_tasks_share_one_set_of_components_in_the_dtype_asked_for(folder: Path) -> None:
    import torch

    loaded = load_diffusers(CLASSES, dataclasses.replace(request(folder), dtype="bf16"), blocks="SomeBlocks")
    assert [type(pipeline).__name__ for pipeline in loaded.by_task.values()] == list(CLASSES.values())
    for name in HEAVY:
        assert len({id(getattr(pipeline, name)) for pipeline in loaded.by_task.values()}) == 1
        assert loaded.components[name].dtype is torch.bfloat16
        assert not loaded.components[name].training
    assert loaded.blocks == "SomeBlocks"


def test_a_tasks_own_settings_come_from_the_folder(folder: Path) -> None:
    change_index(folder, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)
    for pipeline in load_diffusers(CLASSES, request(folder)).by_task.values():
        assert pipeline.config.force_zeros_for_empty_prompt is False
        assert pipeline.config.get("requires_aesthetics_score", True) is True


def test_a_load_that_is_broken_off_leaves_nothing_while_its_error_lives(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    made: list[weakref.ref[torch.nn.Module]] = []
    to = torch.nn.Module.to

    def remember(module: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(weakref.ref(module))
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", remember)

    class StopNow(BaseException):
        pass

    def stop(_: str, done: int, __: int) -> None:
        if done == 2:
            raise StopNow

    with pytest.raises(StopNow) as raised:
        load_diffusers(CLASSES, dataclasses.replace(request(folder), loaded_part=stop))
    gc.collect()
    assert raised.value.__traceback__ is not None
    assert made
    assert [module() for module in made if module() is not None] == []


def renamed(part: Path, variant: str) -> None:
    for weights in part.glob("*.safetensors"):
        weights.rename(weights.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize("parts", [HEAVY, ["unet"], ["text_encoder"]])
def test_a_part_of_which_there_is_only_a_variant_is_loaded_from_it(folder: Path, parts: list[str]) -> None:
    plain = load_diffusers(CLASSES, request(folder)).components
    for part in parts:
        renamed(folder / part, "fp16")

    loaded = load_diffusers(CLASSES, request(folder)).components

    for name in HEAVY:
        for one, other in zip(loaded[name].parameters(), plain[name].parameters(), strict=True):
            assert one.equal(other)


def test_the_plain_weights_go_before_a_variant_beside_them(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    assert load_diffusers(CLASSES, request(folder)).components["vae"] is not None


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "model.safetensors.index.json"])
def test_a_shard_that_is_missing_is_told_whatever_the_variant(folder: Path, index: str) -> None:
    part, variant = folder / "text_encoder", ".fp16" if "fp16" in index else ""
    shards = [f"model-0000{number}-of-00002{variant}.safetensors" for number in (1, 2)]
    (part / "model.safetensors").rename(part / shards[0])
    (part / index).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))

    with pytest.raises(UnsoundWeights, match=f"{shards[1]} of the component 'text_encoder' is missing"):
        count_tensors(folder)


def test_a_folder_of_another_pipeline_is_refused_with_both_names(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"StableDiffusionXLPipeline.*FluxPipeline") as raised:
        load_diffusers({Task.TEXT2IMAGE: "FluxPipeline"}, request(folder))
    assert "OMNIRT_MODEL_FOLDERS" in (raised.value.hint or "")


def test_a_folder_that_can_do_one_of_the_tasks_alone_is_refused(folder: Path) -> None:
    change_index(folder, _class_name="StableDiffusionXLInpaintPipeline")
    with pytest.raises(ConfigurationError, match=r"StableDiffusionXLInpaintPipeline.*StableDiffusionXLPipeline"):
        load_diffusers(CLASSES, request(folder))


def no_file(part: Path) -> None:
    next(part.glob("*.safetensors")).unlink()


def no_folder(part: Path) -> None:
    for path in part.iterdir():
        path.unlink()
    part.rmdir()


def cut_short(part: Path) -> None:
    weights = next(part.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def no_safetensors(part: Path) -> None:
    next(part.glob("*.safetensors")).write_bytes(b"\x80\x04a pickle of old\n" * 64)


def pickled(part: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = next(part.glob("*.safetensors"))
    name = {"model": "pytorch_model"}.get(weights.stem, weights.stem)
    torch.save(load_file(weights), part / f"{name}.bin")
    weights.unlink()


def one_tensor_less(part: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = next(part.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors.pop(min(tensors))
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("spoil", [no_file, no_folder, cut_short, no_safetensors, pickled, one_tensor_less])
def test_a_part_that_is_not_whole_is_named_with_a_remedy_and_no_path(
    folder: Path, spoil: Callable[[Path], None], part: str
) -> None:
    spoil(folder / part)
    with pytest.raises(ModelFailed, match=repr(part)) as raised:
        load_diffusers(CLASSES, request(folder))
    assert raised.value.hint
    assert str(folder) not in str(raised.value)


def no_vocabulary(part: Path) -> None:
    (part / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "part"), [(no_folder, "tokenizer"), (no_vocabulary, "tokenizer_2"), (no_folder, "scheduler")]
)
def test_a_small_part_that_is_missing_is_named_too(folder: Path, spoil: Callable[[Path], None], part: str) -> None:
    spoil(folder / part)
    with pytest.raises(ModelFailed, match=repr(part)) as raised:
        load_diffusers(CLASSES, request(folder))
    assert raised.value.hint
    assert str(folder) not in str(raised.value)


@pytest.mark.parametrize(
    "entry", [["my_pipeline", "MyUNet"], ["os", "system"], ["diffusers", "NoSuchModel"], ["diffusers", "logging"]]
)
def test_a_part_of_another_library_is_refused_as_code_from_elsewhere(folder: Path, entry: list[str]) -> None:
    change_index(folder, unet=entry)
    (folder / "unet" / "my_pipeline.py").write_text("raise SystemExit('run')")
    with pytest.raises(ConfigurationError, match="'unet'") as raised:
        load_diffusers(CLASSES, request(folder))
    assert raised.value.hint


def spoil_index(text: str) -> Callable[[Path], None]:
    def spoil(index: Path) -> None:
        index.write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "holds no model_index.json"),
        (spoil_index("{"), "cannot be read"),
        (spoil_index("[]"), "names no pipeline"),
        (spoil_index('{"_class_name": ["my_pipeline", "Mine"]}'), "names no pipeline"),
    ],
)
def test_a_folder_that_is_none_of_diffusers_is_told(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder / "model_index.json")
    with pytest.raises(OmnirtError, match=message) as raised:
        load_diffusers(CLASSES, request(folder))
    assert raised.value.hint
    assert str(folder) not in str(raised.value)
