"""What a model family says of a model: its tasks, options, defaults, needs, and how to load it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.contract.base import JsonObject

SEED_MAX = 2**63 - 1


class OptionKind(StrEnum):
    """The JSON type of an option's value."""

    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "string"
    BOOLEAN = "boolean"


@dataclass(frozen=True)
class Option:
    """One option of a model: its type, default and bounds are the single source of checks, /v1/models and docs.

    `nullable` allows null (a seed that is to be drawn). Bounds are inclusive. `unit` is "px", "s"… or "".
    """

    name: str
    kind: OptionKind
    default: int | float | str | bool | None
    summary: str
    minimum: int | float | None = None
    maximum: int | float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] | None = None
    nullable: bool = False
    unit: str = ""


@dataclass(frozen=True)
class TaskSpec:
    """What a model does for one task; `options` maps the option's name to it, `presets` overrides by preset name."""

    required_inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...]
    options: Mapping[str, Option]
    artifact_kind: ArtifactKind
    presets: Mapping[str, JsonObject] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadRequest:
    """What a family's loader is asked for: `folder` of the weights, torch `device` ("cuda:0") and `dtype` ("fp16")."""

    folder: Path
    device: str
    dtype: str


# Returns what the executor of the spec's execution mode runs: for `legacy_call` a mapping of each of the model's tasks
# to a diffusers pipeline on the device; the pipelines share their components, so that weights are loaded once.
Loader = Callable[["ModelSpec", LoadRequest], Any]


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    `queue` names the queue of models which live on a device together (`{backend}-{queue}`). `status` is
    stable or beta. `min_memory_bytes` is about what the model takes on a device; nothing refuses a smaller device yet.
    `weights` is the folder that ships with the project, if any; otherwise the operator names one
    (`OMNIRT_MODEL_FOLDERS`). `loader` is None where a backend needs none (cpu-stub).
    """

    id: str
    family: str
    queue: str
    summary: str
    tasks: Mapping[Task, TaskSpec]
    backends: tuple[Backend, ...]
    execution_mode: ExecutionMode
    tier: Tier
    status: str
    aliases: tuple[str, ...] = ()
    owned_by: str = "omnirt"
    min_memory_bytes: int = 0
    weights: Path | None = None
    loader: Loader | None = None
