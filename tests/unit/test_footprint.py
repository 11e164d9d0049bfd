"""What a model and a run take of memory, counted before either is there: headers and arithmetic, no torch."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from omnirt_tasks.registry import discover
from omnirt_tasks.registry.footprint import (
    GIB,
    insufficient_memory,
    nearest_dtype,
    run_working_bytes,
    weights_bytes_by_dtype,
    working_bytes,
)
from omnirt_tasks.registry.weight_files import UnsoundWeights, count_tensors
from omnirt_tasks.registry.work import count_pictures, megapixel_steps, one_picture, picture_prompt

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
Tensors = Mapping[str, tuple[str, list[int]]]


def save(path: Path, tensors: Tensors) -> Path:
    """A safetensors file of zeros: name → (dtype, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size_bytes = BYTES[dtype]
        for side in shape:
            size_bytes *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def pipeline(folder: Path, *components: str) -> Path:
    """A folder with the index of a pipeline of these components."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": "SomePipeline", "safety_checker": [None, None], "force_zeros": True}
    (folder / "model_index.json").write_text(json.dumps(index | {name: ["library", "Class"] for name in components}))
    return folder


def weights_bytes(folder: Path, dtype: str) -> int | None:
    """What the folder's weights take in this dtype; None where that is not known."""
    return weights_bytes_by_dtype(folder, (dtype,)).get(dtype)


def test_numbers_take_the_dtype_asked_for_and_integers_keep_their_own(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"weight": ("F32", [10, 20]), "scale": ("F16", []), "ids": ("I64", [3])})
    assert weights_bytes(tmp_path, "fp32") == 201 * 4 + 3 * 8
    assert weights_bytes(tmp_path, "bf16") == 201 * 2 + 3 * 8
    assert weights_bytes_by_dtype(tmp_path, ("fp32", "fp16")) == {"fp32": 828, "fp16": 426}


def test_only_the_components_of_the_index_count(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "unet", "vae", "tokenizer")
    save(folder / "unet" / "diffusion_pytorch_model.safetensors", {"w": ("F32", [100])})
    save(folder / "vae" / "diffusion_pytorch_model.safetensors", {"w": ("F32", [10])})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    save(folder / "safety_checker" / "model.safetensors", {"w": ("F32", [1000])})
    save(folder / "everything_in_one.safetensors", {"w": ("F32", [1000])})
    assert weights_bytes(folder, "fp32") == 440


def test_the_parts_of_a_sharded_model_are_summed(tmp_path: Path) -> None:
    for part in (1, 2):
        save(tmp_path / f"model-0000{part}-of-00002.safetensors", {"w": ("F16", [part])})
    assert weights_bytes(tmp_path, "fp16") == 6


@pytest.mark.parametrize(
    "variant",
    [
        "model.fp16.safetensors",
        "model.non_ema.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model-00001-of-00002.fp16.safetensors",
    ],
)
def test_a_variant_beside_the_plain_file_does_not_count_and_alone_does(tmp_path: Path, variant: str) -> None:
    save(tmp_path / variant, {"w": ("F16", [7])})
    assert weights_bytes(tmp_path, "fp32") == 28
    save(tmp_path / "model.safetensors", {"w": ("F32", [5])})
    assert weights_bytes(tmp_path, "fp32") == 20


def test_the_shipped_model_is_counted_as_torch_counts_it() -> None:
    import diffusers
    import torch

    folder = discover().find("shapes").weights
    assert folder is not None
    loaded = diffusers.StableDiffusionXLPipeline.from_pretrained(str(folder), local_files_only=True)
    modules = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
    counted = sum(number.numel() for module in modules for number in module.parameters())
    assert weights_bytes(folder, "fp32") == pytest.approx(counted * 4, rel=0.01)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def too_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def no_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")


def not_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2) + b"{{")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def wrong_shape(path: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))


def unknown_dtype(path: Path) -> None:
    text = json.dumps({"w": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))


@pytest.mark.parametrize("spoil", [truncated, too_long, no_header, not_json, empty, wrong_shape, unknown_dtype])
def test_a_spoilt_file_is_told_by_its_name_and_component_and_by_no_path(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = pipeline(tmp_path, "unet", "vae")
    save(folder / "vae" / "diffusion_pytorch_model.safetensors", {"w": ("F32", [4])})
    spoil(save(folder / "unet" / "diffusion_pytorch_model.safetensors", {"w": ("F32", [4])}))
    with pytest.raises(UnsoundWeights) as told:
        count_tensors(folder)
    assert str(told.value) == (
        "The file diffusion_pytorch_model.safetensors of the component 'unet' is corrupt or cut off."
    )
    assert weights_bytes(folder, "fp32") is None


def test_weights_that_may_run_code_are_not_read(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "unet")
    (folder / "unet").mkdir()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsoundWeights, match="component 'unet' are not safetensors"):
        count_tensors(folder)


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    save(tmp_path / "model-00001-of-00002.safetensors", {"a": ("F32", [1])})
    placed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(UnsoundWeights, match=r"model-00002-of-00002\.safetensors of the model is missing"):
        count_tensors(tmp_path)


def test_an_index_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "inside", "../outside")
    save(tmp_path / "outside" / "model.safetensors", {"w": ("F32", [1])})
    with pytest.raises(UnsoundWeights, match="no file"):
        count_tensors(folder)


@pytest.mark.parametrize("index", ["", "[]", '{"unet": ["diffusers", "UNet"]'])
def test_an_index_that_is_none_is_told(tmp_path: Path, index: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(UnsoundWeights, match=r"model_index\.json"):
        count_tensors(tmp_path)


def test_a_folder_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    assert weights_bytes(tmp_path / "nowhere", "fp32") is None
    assert weights_bytes_by_dtype(tmp_path / "nowhere", ("fp32",)) == {}


@dataclass(frozen=True)
class Decoder:
    """A byte for each pixel, and nothing special."""

    working_bytes_per_pixel: int = 1
    working_bytes_per_film_pixel: int | None = None
    working_bytes_per_frame_pixel: int = 0
    working_dtype: str | None = None
    tile_px: int | None = None


PLAIN = Decoder()
TILED = Decoder(tile_px=60)
IN_FP32 = Decoder(working_dtype="fp32")
FILM = Decoder(working_bytes_per_pixel=100, working_bytes_per_film_pixel=250, working_bytes_per_frame_pixel=2)


@pytest.mark.parametrize(
    ("decoder", "config", "num_frames", "expected"),
    [
        (PLAIN, {}, None, 5_000),
        (PLAIN, {"num_images_per_prompt": 3}, None, 15_000),
        (PLAIN, {}, 81, 405_000),
        (PLAIN, {"width": None}, None, 0),
        # The dtype
        (PLAIN, {"dtype": "fp32"}, None, 10_000),
        (PLAIN, {"dtype": "bf16"}, None, 5_000),
        (IN_FP32, {"dtype": "fp32"}, None, 5_000),
        (IN_FP32, {"dtype": "fp16"}, None, 5_000),
        # Slices are whole pictures, one at a time; tiles are of all pictures at once
        (PLAIN, {"num_images_per_prompt": 3, "vae_slicing": True}, None, 5_000),
        (PLAIN, {"num_images_per_prompt": 3, "vae_slicing": False}, None, 15_000),
        (TILED, {}, None, 5_000),
        (TILED, {"vae_tiling": True}, None, 60 * 50),
        (TILED, {"vae_tiling": True, "num_images_per_prompt": 3}, None, 3 * 60 * 50),
        (TILED, {"vae_tiling": True, "num_images_per_prompt": 3, "vae_slicing": True}, None, 60 * 50),
        (TILED, {"vae_tiling": True, "width": 600, "height": 500}, None, 60 * 60),
        (PLAIN, {"vae_tiling": True}, None, 5_000),  # how large its tiles are is not known
        # A film
        (FILM, {}, None, 102 * 5_000),
        (FILM, {}, 2, 204 * 5_000),
        (FILM, {}, 9, (250 + 18) * 5_000),
        (FILM, {"dtype": "fp32"}, 9, 2 * (250 + 18) * 5_000),
        (replace(FILM, tile_px=60), {"vae_tiling": True}, 9, 250 * 3_000 + 18 * 5_000),  # what is done stays whole
    ],
)
def test_working_memory_goes_with_the_pixels_decoded_at_once(
    decoder: Decoder, config: dict[str, Any], num_frames: int | None, expected: int
) -> None:
    assert working_bytes(decoder, {"width": 100, "height": 50, **config}, num_frames, "fp16") == expected


@pytest.mark.parametrize(("frames", "measured"), [(1, 3_494), (5, 9_226), (9, 9_851), (81, 12_900)])
def test_a_film_is_counted_as_it_was_measured(frames: int, measured: int) -> None:
    wan = discover().find("wan2.1-t2v-14b")

    counted = working_bytes(wan, {"width": 1, "height": 1}, frames, "bf16")

    assert measured <= counted <= 1.06 * measured


def request(num_frames: int | None = None, **config: Any) -> ResolvedRequest:
    return ResolvedRequest(
        task=Task.TEXT2IMAGE,
        model="sdxl-base-1.0",
        backend="cuda",
        inputs=Inputs(prompt="a", num_frames=num_frames),
        config=config,
    )


@pytest.mark.parametrize(
    ("model", "in_fp32"), [("sdxl-base-1.0", 1), ("sdxl-turbo", 1), ("sd15", 2), ("sd3-medium", 2)]
)
def test_only_a_decoder_that_follows_the_jobs_dtype_takes_twice_as_much_in_fp32(model: str, in_fp32: int) -> None:
    spec = discover().find(model)
    task = spec.tasks[Task.TEXT2IMAGE]
    assert task.options["dtype"].default == "fp16"
    per_pixel = spec.working_bytes_per_pixel
    for dtype, times in (("fp16", 1), ("fp32", in_fp32)):
        taken = run_working_bytes(spec, task, request(width=64, height=64, dtype=dtype))
        assert taken == times * per_pixel * 64 * 64


def test_every_model_that_offers_tiles_says_how_large_they_are() -> None:
    for spec in discover():
        if any("vae_tiling" in task.options for task in spec.tasks.values()):
            assert spec.tile_px, spec.id


@pytest.mark.parametrize(
    ("wished", "possible", "nearest"),
    [("fp16", ("fp32", "fp16"), "fp16"), ("bf16", ("fp16", "fp32"), "fp32"), ("fp16", ("bf16",), "bf16")],
)
def test_a_dtype_that_is_not_there_becomes_fp32_or_what_there_is(
    wished: str, possible: tuple[str, ...], nearest: str
) -> None:
    assert nearest_dtype(wished, possible) == nearest


SPARING: dict[str, Any] = {"vae_slicing": True, "vae_tiling": True, "dtype": "fp16"}
LAVISH: dict[str, Any] = {"vae_slicing": False, "vae_tiling": False, "dtype": "fp32"}


@pytest.mark.parametrize(
    ("weights", "wish", "hint"),
    [
        (5, request(width=64, **SPARING), "a smaller model, or a device with more memory"),
        (5, request(width=64, **LAVISH), "a dtype of fewer bytes (fp16, bf16), a smaller model, or a device"),
        (2, request(width=64, num_images_per_prompt=2, **SPARING), "smaller pictures, fewer pictures, a smaller model"),
        (
            2,
            request(width=64, num_images_per_prompt=2, **LAVISH),
            "smaller pictures, fewer pictures, vae_slicing, vae_tiling if they are large, a dtype of fewer bytes",
        ),
        (2, request(width=64, num_images_per_prompt=1, vae_slicing=False), "smaller pictures, a smaller model"),
        (2, request(num_frames=9, width=64, **SPARING), "smaller or fewer frames, a smaller model"),
        (2, None, "a smaller model, or a device with more memory"),
    ],
)
def test_the_refusal_names_what_is_needed_what_is_there_and_what_is_not_yet_done_about_it(
    weights: int, wish: ResolvedRequest | None, hint: str
) -> None:
    error = insufficient_memory(weights * GIB, 3 * GIB, 4 * GIB, wish)
    assert f"{weights + 3}.00 GiB" in error.message
    assert "4.00 GiB are available" in error.message
    assert error.hint is not None
    assert error.hint.startswith(f"Ask for {hint}")


def test_work_is_counted_in_megapixels_denoised_by_a_step() -> None:
    config: dict[str, Any] = {"width": 1000, "height": 500, "num_inference_steps": 20}
    assert megapixel_steps(request(**config)) == 10
    assert megapixel_steps(request(**config, num_images_per_prompt=3)) == 30
    assert megapixel_steps(request(**config, strength=0.5)) == 5
    assert megapixel_steps(request(width=64, height=64)) is None


def test_each_of_a_list_of_prompts_has_pictures_of_its_own() -> None:
    one = request(width=1000, height=500, num_inference_steps=20, num_images_per_prompt=2)
    three = one.model_copy(update={"inputs": Inputs(prompt=("a", "b", "c"))})
    spec = discover().find("sdxl-base-1.0")
    task = spec.tasks[Task.TEXT2IMAGE]

    assert [picture_prompt(three, index) for index in range(count_pictures(three))] == ["a", "a", "b", "b", "c", "c"]
    assert megapixel_steps(three) == 3 * (megapixel_steps(one) or 0)
    assert run_working_bytes(spec, task, three) == 3 * run_working_bytes(spec, task, one) > 0


def test_the_least_that_is_run_at_once_is_a_picture_where_a_job_can_be_split() -> None:
    many = request(width=64, num_images_per_prompt=4).model_copy(update={"inputs": Inputs(prompt=("a", "b"))})
    film = request(num_frames=9).model_copy(update={"task": Task.TEXT2VIDEO})
    edit = request(num_images_per_prompt=4).model_copy(update={"task": Task.IMAGE2IMAGE})

    assert one_picture(many).inputs.prompt == "a"
    assert one_picture(many).config == {"width": 64, "num_images_per_prompt": 1}
    assert one_picture(film) == film
    assert one_picture(edit) == edit


def test_counting_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from omnirt_tasks.registry import discover, footprint\n"
        "footprint.weights_bytes_by_dtype(discover().find('shapes').weights, ['fp32']) or sys.exit('not counted')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
