"""Runs any classic diffusers pipeline through its `__call__`.

Shared by all jobs: the weights. A job's own: pipeline object, scheduler, generators, and, while it runs, tokenizers.
"""

import copy
import inspect
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image, ImageOps

from omnirt_tasks.contract import Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import ModelFailed
from omnirt_tasks.registry import DiffusersModel, LoadRequest, ModelSpec
from workers.context import JobContext
from workers.executors import LoadedModel
from workers.executors.pictures import picture_seed, save_pictures
from workers.host import OutputFile, RunOrder

if TYPE_CHECKING:
    import torch

# The scheduler classes behind the names of the contract; "native" is the one that the weights came with.
SCHEDULERS: Mapping[str, str] = {
    "euler-discrete": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
# The components that every job borrows, by the beginning of their names.
LENT_COMPONENTS = ("tokenizer", "feature_extractor")
# Options that steer this executor, and are no arguments of a pipeline.
OWN_OPTIONS = frozenset({"preset", "seed", "dtype", "scheduler"})


class Lender:
    """Lends each job tokenizers that nobody else uses meanwhile, and lends them again.

    Fast tokenizers give wrong lengths when threads share them; a copy of a large vocabulary takes half a second, so
    there are only as many as jobs have run at once.
    """

    def __init__(self, originals: Mapping[str, Any]) -> None:
        self._originals = dict(originals)
        self._free = [self._originals]  # append and pop are atomic

    @contextmanager
    def lent(self) -> Iterator[Mapping[str, Any]]:
        """A set of tokenizers by component name, the borrower's own while inside."""
        try:
            own = self._free.pop()
        except IndexError:
            own = copy.deepcopy(self._originals)
        try:
            yield own
        finally:
            self._free.append(own)


@dataclass(frozen=True)
class SharedPipelines:
    """The pipelines of a model's tasks around the same weights; never changed, never called."""

    by_task: Mapping[Task, Any]
    tokenizers: Lender


class LegacyCallExecutor:
    """Loads a model's pipelines, and runs each job on a copy of its own around the shared weights."""

    # One for the process: the libraries' loaders swap functions and the default dtype of all of it meanwhile.
    _loading: ClassVar[threading.Lock] = threading.Lock()

    def load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        """Raises ModelFailed when the folder is not whole, or what the libraries raise."""
        assert spec.loader is not None, "a model without a loader is not runnable"
        with self._loading:
            _set_up_libraries()
            from workers.executors.heavy import placement, send_to_device

            loaded = spec.loader(spec, request)
            assert isinstance(loaded, DiffusersModel), "what a family of this mode loads"
            by_task, components = loaded.by_task, loaded.components
            send_to_device(components)
        tokenizers = {name: part for name, part in components.items() if name.startswith(LENT_COMPONENTS)}
        return LoadedModel(SharedPipelines(by_task, Lender(tokenizers)), placement(components))

    def run(self, model: LoadedModel, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
        """Raises NonFiniteOutput rather than give a picture made from NaN; ModelFailed for a run without a step."""
        from workers.executors.steps import count_steps

        job.stage("encode_prompt")
        shared: SharedPipelines = model.content
        with shared.tokenizers.lent() as tokenizers:
            pipeline = own_pipeline(shared.by_task[order.request.task], tokenizers, order.request.config)
            count_steps(pipeline.scheduler, getattr(pipeline, "vae", None), job)
            images = pipeline(**call_arguments(pipeline, order)).images
        pictures = _to_pictures(images)
        job.check()
        job.stage("export")
        return save_pictures(pictures, order)


def _set_up_libraries() -> None:
    """Keep the libraries offline, without code from elsewhere, and silent.

    Their warnings quote prompts (what was cut off), and prompts are private; errors come as exceptions anyway.
    """
    # Read when diffusers is imported, here if not before.
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "true")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def own_pipeline(shared: Any, tokenizers: Mapping[str, Any], config: JsonObject) -> Any:
    """A job's own pipeline around the shared weights; its scheduler is its own too, since that counts its steps."""
    components = {**shared.components, **tokenizers}
    if (native := components.get("scheduler")) is not None:
        wanted = SCHEDULERS.get(str(config.get("scheduler")))
        components["scheduler"] = copy.deepcopy(native) if wanted is None else _scheduler(wanted, native)
    # Plain values of a pipeline's own configuration (force_zeros_for_empty_prompt) go along with its components.
    plain = {
        name: shared.config[name]
        for name in inspect.signature(type(shared).__init__).parameters
        if name not in components and name in shared.config
    }
    pipeline = type(shared)(**components, **plain)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_arguments(pipeline: Any, order: RunOrder) -> dict[str, Any]:
    """The arguments of the pipeline's call: of what the request has, those that this class takes."""
    request = order.request
    config = {name: value for name, value in request.config.items() if name not in OWN_OPTIONS and value is not None}
    accepted = inspect.signature(type(pipeline).__call__).parameters
    count = config.get("num_images_per_prompt", 1)
    assert isinstance(count, int)
    given: dict[str, Any] = {
        **config,
        "prompt": request.inputs.prompt,
        "negative_prompt": request.inputs.negative_prompt,
        "generator": _generators(order, count),
        "output_type": "pt",  # numbers, so that they are looked at before they become pixels
    }
    given |= _pictures_given(order, resize="image" in accepted)
    if "image" in given and "strength" in config:
        _require_a_step(config)
    return {name: value for name, value in given.items() if name in accepted and value is not None}


def _generators(order: RunOrder, count: int) -> "list[torch.Generator]":
    """A generator for each picture. On the CPU, whatever the device, so that a seed is the same picture everywhere."""
    import torch

    return [torch.Generator("cpu").manual_seed(picture_seed(order, index)) for index in range(count)]


def _pictures_given(order: RunOrder, *, resize: bool) -> dict[str, Image.Image]:
    """The input pictures as the pipelines name them, cropped to the size asked for."""
    width, height = order.request.config.get("width"), order.request.config.get("height")
    size = (width, height) if isinstance(width, int) and isinstance(height, int) and resize else None
    given = {}
    for input_name, argument, mode in (("image", "image", "RGB"), ("mask", "mask_image", "L")):
        if (path := order.files.get(input_name)) is None:
            continue
        with Image.open(path) as stored:
            picture = ImageOps.exif_transpose(stored).convert(mode)
        if size is not None and picture.size != size:
            picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        given[argument] = picture
    return given


def _require_a_step(config: Mapping[str, Any]) -> None:
    steps, strength = config.get("num_inference_steps"), config["strength"]
    if isinstance(steps, int) and int(steps * strength) < 1:
        raise ModelFailed(
            f"strength {strength} of {steps} steps leaves no step to run.",
            f"Ask for a strength of at least {math.ceil(1000 / steps) / 1000}, or for more steps.",
        )


def _to_pictures(images: Any) -> list[Image.Image]:
    """Pixels from numbers (pictures, channels, height, width) in 0 to 1. Raises NonFiniteOutput."""
    import torch

    from workers.executors.heavy import require_finite

    tensor = images if isinstance(images, torch.Tensor) else torch.stack(list(images))
    require_finite(tensor)
    pixels = tensor.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in pixels]


def _scheduler(class_name: str, native: Any) -> Any:
    import diffusers

    return getattr(diffusers, class_name).from_config(native.config)
