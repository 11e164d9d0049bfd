"""Which models there are and what each allows."""

from omnirt_tasks.registry.catalog import Catalog, discover
from omnirt_tasks.registry.spec import LoadRequest, ModelSpec, Option, OptionKind, TaskSpec

__all__ = ["Catalog", "LoadRequest", "ModelSpec", "Option", "OptionKind", "TaskSpec", "discover"]
