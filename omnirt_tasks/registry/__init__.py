"""Which models there are and what each allows."""

from omnirt_tasks.registry.catalog import Catalog, discover
from omnirt_tasks.registry.runnable import (
    DiffusersModel,
    Launcher,
    Program,
    ProgramRun,
    RankGroup,
    RankJob,
    RankModel,
    RankOutput,
    RankStart,
)
from omnirt_tasks.registry.spec import LoadRequest, ModelSpec, Needs, Option, OptionKind, TaskSpec, Verification

__all__ = [
    "Catalog",
    "DiffusersModel",
    "Launcher",
    "LoadRequest",
    "ModelSpec",
    "Needs",
    "Option",
    "OptionKind",
    "Program",
    "ProgramRun",
    "RankGroup",
    "RankJob",
    "RankModel",
    "RankOutput",
    "RankStart",
    "TaskSpec",
    "Verification",
    "discover",
]
