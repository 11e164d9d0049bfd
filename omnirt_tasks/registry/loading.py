"""Loading a diffusers pipeline from a local folder, as families do it; torch is imported inside."""

import inspect
from collections.abc import Mapping
from typing import Any

from omnirt_tasks.contract import Task
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import LoadRequest


def load_diffusers(
    class_names: Mapping[Task, str], request: LoadRequest, *, blocks: str | None = None
) -> DiffusersModel:
    """A pipeline for each task, of the diffusers class named, on the request's device in its dtype.

    They share one set of components. Safetensors and local files only.
    Raises ConfigurationError when the folder is not there, OSError when it is not whole.
    """
    if not (request.folder / "model_index.json").is_file():
        raise ConfigurationError(
            "The model's folder holds no model_index.json.", "Point OMNIRT_MODEL_FOLDERS at a diffusers folder."
        )
    import diffusers
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[request.dtype]
    (first, class_name), *others = class_names.items()
    pipeline = getattr(diffusers, class_name).from_pretrained(
        str(request.folder), dtype=dtype, local_files_only=True, use_safetensors=True
    )
    pipeline.to(request.device)
    # A task's own pipeline keeps the plain values of the shipped configuration (requires_aesthetics_score…).
    plain = {name: value for name, value in pipeline.config.items() if not isinstance(value, list | tuple)}
    pipelines: dict[Task, Any] = {first: pipeline}
    for task, name in others:
        kind = getattr(diffusers, name)
        takes = inspect.signature(kind.__init__).parameters
        pipelines[task] = kind(
            **{parameter: value for parameter, value in {**plain, **pipeline.components}.items() if parameter in takes}
        )
    return DiffusersModel(pipelines, blocks)
