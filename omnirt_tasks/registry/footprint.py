"""What a model's weights and a run take of a device's memory, counted before either is there.

    needed = weights (from their files' headers) + working memory (for each pixel that is decoded at once)

The router counts with what capability records tell, a host with its own folders: by the same functions.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from omnirt_tasks.contract import ResolvedRequest
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import InsufficientMemory
from omnirt_tasks.registry.options import COUNT_OPTION
from omnirt_tasks.registry.spec import TaskSpec
from omnirt_tasks.registry.weight_files import UnsoundWeights, count_tensors
from omnirt_tasks.registry.work import count_pictures, count_prompts

FALLBACK_DTYPE = "fp32"
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
GIB = 2**30
MIB = 2**20


class Decoding(Protocol):
    """What a model's decoder takes to work in: a spec says it, and so does the ability made from one.

    `working_bytes_per_pixel` is for each pixel of a picture, or of a lone frame, that is decoded at once. It holds for
    the task's default dtype and grows with the job's; where the decoder keeps a dtype of its own, `working_dtype`
    names that, and it does not. The frames of a film take as much each, but never more than
    `working_bytes_per_film_pixel` together (None: no such bound), and `working_bytes_per_frame_pixel` for each of them
    that is done. Tiles are at most `tile_px` wide and high; None where that is not known.
    """

    @property
    def working_bytes_per_pixel(self) -> int: ...
    @property
    def working_bytes_per_film_pixel(self) -> int | None: ...
    @property
    def working_bytes_per_frame_pixel(self) -> int: ...
    @property
    def working_dtype(self) -> str | None: ...
    @property
    def tile_px(self) -> int | None: ...


def weights_bytes_by_dtype(folder: Path, dtypes: Iterable[str]) -> dict[str, int]:
    """What the folder's weights take once loaded in each of the dtypes; empty where its files do not tell.

    Whole numbers keep their size. A part that a family keeps in another format is not known here.
    """
    try:
        count = count_tensors(folder)
    except (UnsoundWeights, OSError):
        return {}
    return {dtype: count.floats * DTYPE_BYTES[dtype] + count.other_bytes for dtype in dtypes}


def default_dtype(task: TaskSpec) -> str:
    """The dtype that a job of this task has the model in, unless it asks for another."""
    option = task.options.get("dtype")
    return FALLBACK_DTYPE if option is None else str(option.default)


def nearest_dtype(wished: str, possible: Sequence[str]) -> str:
    """The wished dtype if it is one of those possible, of which there is one at least; else fp32, else the first."""
    if wished in possible:
        return wished
    return FALLBACK_DTYPE if FALLBACK_DTYPE in possible else possible[0]


def working_bytes(
    decoding: Decoding, config: JsonObject, num_frames: int | None, default_dtype: str, prompts: int = 1
) -> int:
    """What a run takes beside the weights, at the most: while all its pictures, or frames, are decoded together.

    With `vae_slicing` there is one picture at a time, with `vae_tiling` one tile of each. 0 where the config tells no
    size.
    """
    pictures = 1 if config.get("vae_slicing") is True else prompts * _count(config, COUNT_OPTION, 1)
    width_px, height_px = _count(config, "width", 0), _count(config, "height", 0)
    tile_px = decoding.tile_px if config.get("vae_tiling") is True else None
    at_once_px = width_px * height_px if tile_px is None else min(width_px, tile_px) * min(height_px, tile_px)
    frames = num_frames or 1
    per_pixel_bytes = decoding.working_bytes_per_pixel * frames
    if decoding.working_bytes_per_film_pixel is not None:
        per_pixel_bytes = min(per_pixel_bytes, decoding.working_bytes_per_film_pixel)
    done_bytes = decoding.working_bytes_per_frame_pixel * frames * width_px * height_px  # of all tiles
    size_bytes = pictures * (per_pixel_bytes * at_once_px + done_bytes)
    if decoding.working_dtype is not None:
        return size_bytes
    return size_bytes * DTYPE_BYTES[str(config.get("dtype", default_dtype))] // DTYPE_BYTES[default_dtype]


def run_working_bytes(decoding: Decoding, task: TaskSpec, request: ResolvedRequest) -> int:
    """`working_bytes` of a request for this task."""
    prompts = count_prompts(request)
    return working_bytes(decoding, request.config, request.inputs.num_frames, default_dtype(task), prompts)


def needed_bytes(weights_bytes: int, working_bytes: int) -> int:
    """What a device must have free for the run, once everything else has gone."""
    return weights_bytes + working_bytes


def insufficient_memory(
    weights_bytes: int, working_bytes: int, available_bytes: int, request: ResolvedRequest | None = None
) -> InsufficientMemory:
    """The error for what could never fit into `available_bytes`, with what of the request would help if changed."""
    needed = needed_bytes(weights_bytes, working_bytes)
    remedies = () if request is None else _remedies(request, working=weights_bytes <= available_bytes)
    return InsufficientMemory(
        f"The run needs {in_words(needed)} of device memory ({in_words(weights_bytes)} for the model, "
        f"{in_words(working_bytes)} to work in); {in_words(available_bytes)} are available.",
        f"Ask for {', '.join((*remedies, 'a smaller model'))}, or a device with more memory.",
    )


def _remedies(request: ResolvedRequest, *, working: bool) -> tuple[str, ...]:
    """What would take less and is not so yet: of the weights, and if `working`, of what the run works in.

    A resolved config has all options that there are, each at least with its default.
    """
    config, frames = request.config, request.inputs.num_frames or 1
    pictures = count_pictures(request)
    of_run = (
        ("smaller pictures", "width" in config and frames == 1),
        ("smaller or fewer frames", frames > 1),
        ("fewer pictures", pictures > 1),
        ("vae_slicing", pictures > 1 and config.get("vae_slicing") is False),
        ("vae_tiling if they are large", config.get("vae_tiling") is False),
    )
    always = (("a dtype of fewer bytes (fp16, bf16)", DTYPE_BYTES.get(str(config.get("dtype"))) == 4),)
    return tuple(remedy for remedy, helps in (*(of_run if working else ()), *always) if helps)


def in_words(size_bytes: int) -> str:
    """A size as people read it."""
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.2f} MiB"


def _count(config: JsonObject, name: str, default: int) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else default
