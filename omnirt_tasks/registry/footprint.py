"""What a model's weights and a run take of a device's memory, counted before either is there.

    needed = weights (from their files' headers) + working memory (for each pixel that is decoded at once)

The router counts with what capability records tell, a host with its own folders: by the same functions.
"""

from collections.abc import Iterable
from pathlib import Path

from omnirt_tasks.contract import ResolvedRequest
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import InsufficientMemory
from omnirt_tasks.registry.spec import ModelSpec, TaskSpec
from omnirt_tasks.registry.weight_files import UnsoundWeights, count_tensors

FALLBACK_DTYPE = "fp32"
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# With either, a decoder has one picture or frame in hand at a time.
SPARING_OPTIONS = ("vae_slicing", "vae_tiling")
GIB = 2**30
MIB = 2**20


def weights_bytes(folder: Path, dtype: str) -> int | None:
    """What the folder's weights take once loaded in this dtype; None where its files do not tell.

    Whole numbers keep their size. A part that a family keeps in another format is not known here.
    """
    return weights_bytes_by_dtype(folder, (dtype,)).get(dtype)


def weights_bytes_by_dtype(folder: Path, dtypes: Iterable[str]) -> dict[str, int]:
    """`weights_bytes` for each of the dtypes; empty where the files do not tell."""
    try:
        count = count_tensors(folder)
    except (UnsoundWeights, OSError):
        return {}
    return {dtype: count.floats * DTYPE_BYTES[dtype] + count.other_bytes for dtype in dtypes}


def default_dtype(task: TaskSpec) -> str:
    """The dtype that a task's `working_bytes_per_pixel` holds for."""
    option = task.options.get("dtype")
    return FALLBACK_DTYPE if option is None else str(option.default)


def working_bytes(bytes_per_pixel: int, config: JsonObject, num_frames: int | None, default_dtype: str) -> int:
    """What a run takes beside the weights: `bytes_per_pixel` in the default dtype for each pixel decoded at once.

    Those are the pixels of all pictures, or frames, of the job; of one of them where the config slices or tiles the
    VAE. A dtype of half the size takes half. 0 where the config tells no size.
    """
    width_px, height_px = _count(config, "width", 0), _count(config, "height", 0)
    at_once = _count(config, "num_images_per_prompt", 1) * (num_frames or 1)
    if any(config.get(option) is True for option in SPARING_OPTIONS):
        at_once = 1
    in_default = bytes_per_pixel * width_px * height_px * at_once
    return in_default * DTYPE_BYTES[str(config.get("dtype", default_dtype))] // DTYPE_BYTES[default_dtype]


def run_working_bytes(spec: ModelSpec, request: ResolvedRequest) -> int:
    """`working_bytes` of a request for this model."""
    return working_bytes(
        spec.working_bytes_per_pixel,
        request.config,
        request.inputs.num_frames,
        default_dtype(spec.tasks[request.task]),
    )


def needed_bytes(weights_bytes: int, working_bytes: int) -> int:
    """What a device must have free for the run, once everything else has gone."""
    return weights_bytes + working_bytes


def insufficient_memory(weights_bytes: int, working_bytes: int, available_bytes: int) -> InsufficientMemory:
    """The error for what could never fit into `available_bytes`, with what would help."""
    needed = needed_bytes(weights_bytes, working_bytes)
    if weights_bytes > available_bytes:
        hint = "Ask for a dtype of fewer bytes (fp16, bf16) or a smaller model, or for a device with more memory."
    else:
        hint = "Ask for fewer or smaller pictures or frames, a dtype of fewer bytes, or vae_tiling where there is one."
    return InsufficientMemory(
        f"The run needs {in_words(needed)} of device memory ({in_words(weights_bytes)} for the model, "
        f"{in_words(working_bytes)} to work in); {in_words(available_bytes)} are available.",
        hint,
    )


def in_words(size_bytes: int) -> str:
    """A size as people read it."""
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.2f} MiB"


def _count(config: JsonObject, name: str, default: int) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else default
