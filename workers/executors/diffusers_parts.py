"""What runs of diffusers pipelines share, classic and modular: one load, and what each job must have of its own.

load ─► the family's loader ─► heavy modules sent to the device thread ─► LoadedModel
run  ─► own scheduler, VAE, generators, lent tokenizers ─► the pipeline ─► numbers ─► pictures or videos
"""

import copy
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from PIL import Image, ImageOps

from omnirt_tasks.contract import Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.registry import DiffusersModel, LoadRequest, ModelSpec
from omnirt_tasks.registry.work import count_pictures
from workers.checkpoints import CheckpointWriter
from workers.context import JobContext, current_job
from workers.executors import LoadedModel
from workers.executors.pictures import picture_seed, save_pictures
from workers.executors.videos import save_video
from workers.host import OutputFile, RunOrder

if TYPE_CHECKING:
    import torch

S = TypeVar("S")

# The scheduler classes behind the names of the contract; "native" is the one that the weights came with.
SCHEDULERS: Mapping[str, str] = {
    "euler-discrete": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
# The components that every job borrows, by the beginning of their names.
LENT_COMPONENTS = ("tokenizer", "feature_extractor", "processor")
# For models with true_cfg_scale, whose pipelines do without guidance unless there is one.
NO_NEGATIVE_PROMPT = " "
# Tasks whose input pictures are one for each picture that is made.
CHANGES_PICTURES = frozenset({Task.IMAGE2IMAGE, Task.INPAINT})
# The input pictures: the request's name, the pipelines' name, and the mode that these want.
PICTURE_INPUTS = (("image", "image", "RGB"), ("mask", "mask_image", "L"))
# What an upload may be; Pillow knows many more.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
# How soon a job that waits for another model's load hears that it is to stop; nobody can wake who waits for a lock.
LISTEN_EVERY_S = 0.1


class Lender:
    """Lends each job tokenizers that nobody else uses meanwhile, and lends them again.

    Fast tokenizers give wrong lengths when threads share them; a copy of a large vocabulary takes half a second, so
    there are only as many as jobs have run at once.
    """

    def __init__(self, originals: Mapping[str, Any]) -> None:
        self._first = dict(originals)  # lent like any other
        self._free = [self._first]  # append and pop are atomic

    @contextmanager
    def lent(self) -> Iterator[Mapping[str, Any]]:
        """A set of tokenizers by component name, the borrower's own while inside."""
        try:
            own = self._free.pop()
        except IndexError:
            own = copy.deepcopy(self._first)
        try:
            yield own
        finally:
            self._free.append(own)


class DiffusersExecutor(ABC, Generic[S]):
    """Loads a model once, and runs each job on a pipeline of its own around the shared weights.

    S is what a mode keeps of a loaded model for all jobs; nobody changes it.
    """

    # One for the process: the libraries' loaders swap functions of all of it meanwhile, as `own_default_dtype` does.
    _loading: ClassVar[threading.Lock] = threading.Lock()

    def load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        """Raises ModelFailed or ConfigurationError when the folder is not whole, or what the libraries raise."""
        assert spec.loader is not None, "a model without a loader is not runnable"
        with self._turn_to_load():
            _set_up_libraries()
            from workers.executors.heavy import keep_in_fp32_what_overflows, placement, send_to_device, size_bytes
            from workers.executors.loading_dtype import own_default_dtype

            with own_default_dtype():
                loaded = spec.loader(spec, request)
            assert isinstance(loaded, DiffusersModel), "what a family of this mode loads"
            components = loaded.components
            keep_in_fp32_what_overflows(loaded.by_task.values())
            sharing = send_to_device(components, compiled=request.compile)
            tokenizers = {name: part for name, part in components.items() if name.startswith(LENT_COMPONENTS)}
            return LoadedModel(
                self._shared(loaded, Lender(tokenizers)),
                placement(components),
                size_bytes=size_bytes(components),
                checkpointing=spec.checkpointing,
                sharing=sharing,
            )

    def run(self, model: LoadedModel, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
        """Raises NonFiniteOutput rather than give a picture made from NaN."""
        job.stage("encode_prompt")
        numbers = self._call(model.content, order, job, CheckpointWriter(job, model.checkpointing))
        job.check()
        job.stage("export")
        return _save(numbers, order, job)

    @contextmanager
    def _turn_to_load(self) -> Iterator[None]:
        """Wait for other loads to end, alone from then on. Raises Interrupted when the job is to stop meanwhile."""
        job = current_job()
        while not self._loading.acquire(timeout=LISTEN_EVERY_S):
            if job is not None:
                job.check()
        try:
            yield
        finally:
            self._loading.release()

    @abstractmethod
    def _shared(self, loaded: DiffusersModel, tokenizers: Lender) -> S:
        """What the jobs of a freshly loaded model share."""

    @abstractmethod
    def _call(self, shared: S, order: RunOrder, job: JobContext, checkpoints: CheckpointWriter) -> Any:
        """Run the job's own pipeline; its output in numbers from 0 to 1, as `output_type="pt"` gives them."""


def own_components(shared: Mapping[str, Any], tokenizers: Mapping[str, Any], config: JsonObject) -> dict[str, Any]:
    """A pipeline's components for one job: those that it changes are its own, the others are shared."""
    from workers.executors.heavy import own_vae

    components = {**shared, **tokenizers}
    if (native := components.get("scheduler")) is not None:
        wanted = SCHEDULERS.get(str(config.get("scheduler")))
        components["scheduler"] = copy.deepcopy(native) if wanted is None else _scheduler(wanted, native)
    slicing, tiling = config.get("vae_slicing") is True, config.get("vae_tiling") is True
    if slicing or tiling:
        components["vae"] = own_vae(components["vae"], slicing=slicing, tiling=tiling)
    return components


def call_arguments(accepted: Collection[str], order: RunOrder) -> dict[str, Any]:
    """The arguments of a pipeline's call: of what the request has, those that the pipeline takes."""
    request = order.request
    config = request.config
    count = count_pictures(request)
    negative_prompt = request.inputs.negative_prompt
    if negative_prompt is None and "true_cfg_scale" in config:
        negative_prompt = NO_NEGATIVE_PROMPT
    given: dict[str, Any] = {
        **config,
        "prompt": request.inputs.prompt,
        "negative_prompt": negative_prompt,
        "num_frames": request.inputs.num_frames,
        "generator": _generators(order, count),
        "output_type": "pt",  # numbers, so that they are looked at before they become pixels
    }
    if isinstance(prompts := request.inputs.prompt, tuple):
        given |= _one_for_each_picture(prompts, negative_prompt, count)
    for name, picture in _pictures_given(order, resize="image" in accepted).items():
        # One for each picture to be made: from a single one, pipelines draw what all its pictures begin with from the
        # first seed.
        given[name] = [picture] * count if count > 1 and request.task in CHANGES_PICTURES else picture
    return {name: value for name, value in given.items() if name in accepted and value is not None}


def _one_for_each_picture(prompts: Sequence[str], negative_prompt: str | None, count: int) -> dict[str, Any]:
    """Prompts that differ, as pipelines take them: some mix up whose pictures are whose if they are to repeat them."""
    repeated = [prompt for prompt in prompts for _ in range(count // len(prompts))]
    return {
        "prompt": repeated,
        # Some want it to be of the prompt's own kind.
        "negative_prompt": None if negative_prompt is None else [negative_prompt] * count,
        "num_images_per_prompt": 1,
    }


def _set_up_libraries() -> None:
    """Keep the libraries offline, without code from elsewhere, and silent.

    Their warnings quote prompts (what was cut off), and prompts are private; errors come as exceptions anyway, which
    modular pipelines write out in full besides.
    """
    # Read when diffusers is imported, here if not before.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "true"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity(logging.CRITICAL)
    diffusers_logging.disable_progress_bar()


def _generators(order: RunOrder, count: int) -> "list[torch.Generator]":
    """A generator for each picture. On the CPU, whatever the device, so that a seed is the same picture everywhere."""
    import torch

    return [torch.Generator("cpu").manual_seed(picture_seed(order, index)) for index in range(count)]


def _pictures_given(order: RunOrder, *, resize: bool) -> dict[str, Image.Image]:
    """The input pictures as the pipelines name them, cropped to the size asked for; a mask lies on its picture."""
    given = {
        argument: _opened(order.files[name], mode) for name, argument, mode in PICTURE_INPUTS if name in order.files
    }
    if "image" in given and "mask_image" in given:
        # Before the crop, which would else take another part of each.
        given["mask_image"] = _resized(given["mask_image"], given["image"].size)
    width, height = order.request.config.get("width"), order.request.config.get("height")
    if not (resize and isinstance(width, int) and isinstance(height, int)):
        return given
    return {name: _cropped(picture, (width, height)) for name, picture in given.items()}


def _opened(path: Path, mode: str) -> Image.Image:
    with Image.open(path, formats=PICTURE_FORMATS) as stored:
        return _in_bytes(ImageOps.exif_transpose(stored)).convert(mode)


def _in_bytes(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits in eight: Pillow's own conversion cuts off what is above 255, and all is white."""
    if not picture.mode.startswith("I"):
        return picture
    return picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _cropped(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _scheduler(class_name: str, native: Any) -> Any:
    import diffusers

    return getattr(diffusers, class_name).from_config(native.config)


def _save(numbers: Any, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
    """Files from numbers in 0 to 1: (pictures, channels, height, width), or (videos, frames, channels, …)."""
    import torch

    from workers.executors.heavy import require_finite

    tensor = numbers if isinstance(numbers, torch.Tensor) else torch.stack(list(numbers))
    require_finite(tensor)
    pixels = tensor.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8).movedim(-3, -1).numpy()
    if pixels.ndim == 5:
        return tuple(save_video(frames, index, order, job) for index, frames in enumerate(pixels))
    pictures = [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in pixels]
    return save_pictures(pictures, order)
