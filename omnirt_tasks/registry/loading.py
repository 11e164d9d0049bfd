"""Loading a diffusers pipeline from a local folder, as families do it; torch is imported inside."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omnirt_tasks.contract import Task
from omnirt_tasks.errors import ConfigurationError, ModelFailed
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import LoadRequest
from omnirt_tasks.registry.weight_files import lone_variant

INDEX = "model_index.json"
DOWNLOAD_AGAIN = "Fetch the model's folder again, with its safetensors files."


def load_diffusers(
    class_names: Mapping[Task, str], request: LoadRequest, *, blocks: str | None = None
) -> DiffusersModel:
    """A pipeline for each task, of the diffusers class named, on the request's device in its dtype.

    The folder is to be one of the first class. They share one set of components, which are loaded one by one.
    Safetensors and local files only.
    Raises ConfigurationError when the folder is no diffusers folder, is one of another class, or wants code that is
    neither diffusers' nor transformers'; ModelFailed, naming the component, when the folder is not whole; what
    `loaded_part` raises.
    """
    index = _index(request.folder)
    (first, class_name), *others = class_names.items()
    _require_class(index, class_name)
    import diffusers
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[request.dtype]
    kind = getattr(diffusers, class_name)
    takes = inspect.signature(kind.__init__).parameters
    classes = {name: found for name, found in _classes(index) if name in takes}
    for name, found in classes.items():
        _require_files(request.folder / name, found)
    heavy = {name: found for name, found in classes.items() if issubclass(found, torch.nn.Module)}
    parts: dict[str, Any] = {}
    try:
        for done, (name, found) in enumerate(heavy.items(), start=1):
            with _named(name):
                parts[name] = _load(found, request, name, dtype)
            request.loaded_part(name, done, len(heavy))
        with _named("tokenizer or scheduler"):
            pipeline = kind.from_pretrained(str(request.folder), dtype=dtype, local_files_only=True, **parts)
    except BaseException:
        parts.clear()  # the traceback lives on for a while, and would hold them
        raise
    pipeline.to(request.device)
    # A task's own pipeline keeps the plain values of the shipped configuration (requires_aesthetics_score…).
    plain = {name: value for name, value in {**pipeline.config, **index}.items() if not isinstance(value, list | tuple)}
    pipelines: dict[Task, Any] = {first: pipeline}
    for task, name in others:
        kind = getattr(diffusers, name)
        takes = inspect.signature(kind.__init__).parameters
        pipelines[task] = kind(
            **{parameter: value for parameter, value in {**plain, **pipeline.components}.items() if parameter in takes}
        )
    return DiffusersModel(pipelines, blocks)


def _index(folder: Path) -> Mapping[str, Any]:
    """The folder's list of components: name → [library, class]."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"The model's folder holds no {INDEX}.", "Point OMNIRT_MODEL_FOLDERS at a diffusers folder."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelFailed(f"The model's {INDEX} cannot be read.", DOWNLOAD_AGAIN) from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ConfigurationError(
            f"The model's {INDEX} names no pipeline of diffusers.", "Use a folder of one: code in a folder never runs."
        )
    return index


def _classes(index: Mapping[str, Any]) -> Iterator[tuple[str, type]]:
    """The class of each component that the folder has."""
    for name, entry in index.items():
        match entry:
            case [None, None]:
                continue
            case [str(library), str(class_name)]:
                yield name, _class(name, library, class_name)


def _class(component: str, library: str, class_name: str) -> type:
    import diffusers
    import transformers

    # Some pipelines have classes of their own: ["stable_diffusion", "StableDiffusionSafetyChecker"].
    known = {"diffusers": diffusers, "transformers": transformers}
    source = known.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(source, class_name, None)
    if not isinstance(found, type):
        raise ConfigurationError(
            f"The model's component {component!r} is {library}.{class_name}, which is no class of diffusers or "
            "transformers.",
            "Use a folder whose components are: code in a folder never runs.",
        )
    return found


def _require_class(index: Mapping[str, Any], wanted: str) -> None:
    """Refuse a folder of another pipeline: what it lacks would be None until a job calls it."""
    if (held := index["_class_name"]) != wanted:
        raise ConfigurationError(
            f"The model's folder holds a {held}; this model is a {wanted}.",
            "Point OMNIRT_MODEL_FOLDERS at a folder of this model.",
        )


def _require_files(folder: Path, found: Any) -> None:
    """Look for what the libraries do without: where a vocabulary is missing, they make a tokenizer of two tokens."""
    vocabularies = getattr(found, "vocab_files_names", {}).values()
    if not folder.is_dir() or (vocabularies and not any((folder / name).is_file() for name in vocabularies)):
        raise _broken(folder.name)


def _broken(component: str) -> ModelFailed:
    return ModelFailed(
        f"The model's component {component!r} cannot be loaded: its files are missing or broken.", DOWNLOAD_AGAIN
    )


def _load(found: Any, request: LoadRequest, name: str, dtype: Any) -> Any:
    """A component with its weights, on the device, alone: the host's memory holds one at a time."""
    module, told = found.from_pretrained(
        str(request.folder),
        subfolder=name,
        dtype=dtype,
        variant=lone_variant(request.folder / name),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := told["missing_keys"]:  # they would be random numbers
        raise ModelFailed(
            f"The model's component {name!r} lacks {len(missing)} of its weights, among them {min(missing)!r}.",
            DOWNLOAD_AGAIN,
        )
    return module.to(request.device)


@contextmanager
def _named(component: str) -> Iterator[None]:
    """Turns what the libraries raise over missing or broken files into ModelFailed with the component's name."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise _broken(component) from error
