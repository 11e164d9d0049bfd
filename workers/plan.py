"""What a worker is to serve: from the queues it was given, or from what this host has."""

import importlib.util
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omnirt_tasks.contract import Backend, ExecutionMode
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import Catalog, ModelSpec
from omnirt_tasks.routing import parse_queue, queue_name
from omnirt_tasks.settings import Settings

# The best first; the stub is never chosen for anybody.
BY_PREFERENCE = (Backend.CUDA, Backend.ASCEND, Backend.CPU)


@dataclass(frozen=True)
class Plan:
    """One backend, its queues without tags, the models on them that can run here, and where their weights are."""

    backend: str
    queues: tuple[str, ...]
    models: tuple[ModelSpec, ...]
    folders: dict[str, Path]

    @property
    def execution_mode(self) -> ExecutionMode | None:
        """How every model of it is run; None when they differ."""
        modes = {spec.execution_mode for spec in self.models}
        return modes.pop() if len(modes) == 1 else None


def plan_for_queues(names: Sequence[str], catalog: Catalog, settings: Settings) -> Plan:
    """The plan for the queues that a worker was told to serve.

    Raises ConfigurationError for a name that is none, for queues of several backends, with tags, or of models whose
    weights are not here.
    """
    addresses = [parse_queue(name) for name in names]
    if tagged := [str(address) for address in addresses if address.tags]:
        raise ConfigurationError(f"The queue {tagged[0]!r} names tags.", "Leave them out, and set OMNIRT_TAGS instead.")
    backends = sorted({address.backend for address in addresses})
    if len(backends) > 1:
        raise ConfigurationError(
            f"The queues belong to the backends {' and '.join(backends)}.", "A worker serves one: start one for each."
        )
    models: list[ModelSpec] = []
    for address in addresses:
        known = catalog.on_queue(address.queue, address.backend)
        if not known:
            raise ConfigurationError(
                f"No model lives on the queue {str(address)!r}.", f"Queues are {', '.join(_all_queues(catalog))}."
            )
        runnable = _runnable(known, address.backend, settings)
        if not runnable:
            lacking = "; ".join(f"{spec.id} lacks {' and '.join(missing(spec, settings))}" for spec in known)
            raise ConfigurationError(
                f"Nothing on the queue {str(address)!r} can run here: {lacking}.",
                'Set OMNIRT_MODEL_FOLDERS={"MODEL": "FOLDER"} for weights, and install the rest.',
            )
        models.extend(runnable)
    return _plan(backends[0], models, settings)


def plan_for_backend(backend: Backend, catalog: Catalog, settings: Settings) -> Plan | None:
    """The plan for all that the backend can run here; None when there are no weights for any model of it."""
    models = _runnable([spec for spec in catalog if backend in spec.backends], backend, settings)
    return _plan(backend, models, settings) if models else None


def _plan(backend: str, models: Sequence[ModelSpec], settings: Settings) -> Plan:
    folders = {spec.id: folder for spec in models if (folder := _folder(spec, settings)) is not None}
    queues = dict.fromkeys(queue_name(backend, spec.queue) for spec in models)
    return Plan(str(backend), tuple(queues), tuple(models), folders)


def _runnable(specs: Iterable[ModelSpec], backend: str, settings: Settings) -> list[ModelSpec]:
    """Those that can run here; the stub needs no weights, nor what loads them."""
    return [
        spec
        for spec in specs
        if backend == Backend.CPU_STUB or (spec.loader is not None and not missing(spec, settings))
    ]


def missing(spec: ModelSpec, settings: Settings) -> tuple[str, ...]:
    """What a model needs and this host has not, in words that follow "lacks"."""
    needs = spec.needs
    weights = ("its weights",) if needs.weights and _folder(spec, settings) is None else ()
    programs = (f"the program {name}" for name in needs.programs if shutil.which(name) is None)
    packages = (f"the Python package {name}" for name in needs.packages if importlib.util.find_spec(name) is None)
    return (*weights, *programs, *packages)


def _folder(spec: ModelSpec, settings: Settings) -> Path | None:
    folder = settings.model_folders.get(spec.id, spec.weights)
    return folder if folder is not None and folder.is_dir() else None


def _all_queues(catalog: Catalog) -> list[str]:
    return sorted({queue_name(backend, spec.queue) for spec in catalog for backend in spec.backends})
