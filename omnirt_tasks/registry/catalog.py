"""The catalog of models: found by walking the `models` folder, so that nobody edits a list."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import MappingProxyType

from omnirt_tasks.contract import Task, Tier
from omnirt_tasks.errors import ConfigurationError, ModelNotFound
from omnirt_tasks.registry.spec import ModelSpec

NEAREST_COUNT = 3


class Catalog:
    """Models by id and alias. Immutable, so threads share it freely."""

    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        """Raises ConfigurationError when two models claim one name: registration is all or nothing."""
        by_id: dict[str, ModelSpec] = {}
        by_name: dict[str, ModelSpec] = {}
        for spec in specs:
            by_id[spec.id] = spec
            for name in (spec.id, *spec.aliases):
                if name in by_name:
                    raise ConfigurationError(
                        f"The model name {name!r} is claimed by {by_name[name].family!r} and by {spec.family!r}.",
                        "Rename one of them.",
                    )
                by_name[name] = spec
        self._by_id: Mapping[str, ModelSpec] = MappingProxyType(dict(sorted(by_id.items())))
        self._by_name: Mapping[str, ModelSpec] = MappingProxyType(by_name)

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self._by_id.values())

    def find(self, name: str) -> ModelSpec:
        """The model with this id or alias. Raises ModelNotFound, whose hint names the nearest ones."""
        spec = self._by_name.get(name)
        if spec is not None:
            return spec
        nearest = difflib.get_close_matches(name.lower(), self._by_name, n=NEAREST_COUNT, cutoff=0.5)
        shown = name if len(name) <= 80 else name[:77] + "..."
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else "GET /v1/models lists every model."
        raise ModelNotFound(f"No model is named {shown!r}.", hint)

    def having(self, *, task: Task | None = None, tier: Tier | None = None) -> tuple[ModelSpec, ...]:
        """The models of a task, a tier, or both, by id."""
        return tuple(
            spec for spec in self if (task is None or task in spec.tasks) and (tier is None or spec.tier == tier)
        )

    def on_queue(self, queue: str, backend: str) -> tuple[ModelSpec, ...]:
        """The models that live on the queue `{backend}-{queue}`."""
        return tuple(spec for spec in self if spec.queue == queue and backend in spec.backends)


@cache
def discover() -> Catalog:
    """The catalog of every family in `omnirt_tasks.models`: each module there has a tuple `SPECS`.

    Raises ConfigurationError, naming the module, when a family cannot be imported or has no SPECS.
    """
    models = importlib.import_module("omnirt_tasks.models")
    specs: list[ModelSpec] = []
    for found in sorted(pkgutil.iter_modules(models.__path__), key=lambda module: module.name):
        name = f"{models.__name__}.{found.name}"
        try:
            specs.extend(importlib.import_module(name).SPECS)
        except Exception as error:
            raise ConfigurationError(
                f"The model family {found.name!r} cannot be used: {error}", "Mend or remove its file."
            ) from error
    return Catalog(specs)
