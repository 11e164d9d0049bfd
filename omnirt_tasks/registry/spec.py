"""What a model family says of a model: its tasks, options, defaults, needs, and how to load it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry.runnable import Runnable

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

    `nullable` allows null (a seed that is to be drawn). Bounds are inclusive. A value is `remainder` more than a
    multiple of `multiple_of` (the 4n + 1 frames of a video). `unit` is "px", "s"… or "".
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
    remainder: int = 0


@dataclass(frozen=True)
class TaskSpec:
    """What a model does for one task; `options` maps the option's name to it, `presets` overrides by preset name.

    `numbers` are the bounds and defaults of those inputs that are numbers (num_frames, fps).
    """

    required_inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...]
    options: Mapping[str, Option]
    artifact_kind: ArtifactKind
    presets: Mapping[str, JsonObject] = field(default_factory=dict)
    numbers: Mapping[str, Option] = field(default_factory=dict)


class Verification(StrEnum):
    """How far a model is known to work; the later, the more."""

    SPEC = "spec only"
    TINY_WEIGHTS = "tiny random weights"
    REAL_DEVICE = "real device"
    REAL_WEIGHTS = "real weights"


@dataclass(frozen=True)
class Needs:
    """What must be on a host before it can run a model: weights, programs on PATH, Python packages."""

    weights: bool = True
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpointing:
    """When a long job's denoising state is kept: after so many steps, or so many seconds, whichever comes first."""

    every_steps: int | None = None
    every_s: float | None = None


def _say_nothing(part: str, done: int, total: int) -> None:
    del part, done, total


@dataclass(frozen=True)
class LoadRequest:
    """What a family's loader is asked for: `folder` of the weights, torch `device` ("cuda:0") and `dtype` ("fp16").

    `compile` asks for a compiled denoiser, `devices` for that many ranks of a rank group. `loaded_part` is called after
    each of `total` parts, with its name and how many are done; it may raise, to end the load.
    """

    folder: Path
    device: str
    dtype: str
    compile: bool = False
    devices: int = 1
    loaded_part: Callable[[str, int, int], None] = _say_nothing


# Returns what the executor of the spec's execution mode runs (see `registry.runnable`): a DiffusersModel for modular
# and legacy_call, a Program for subprocess, a RankGroup for persistent_worker.
Loader = Callable[["ModelSpec", LoadRequest], Runnable]


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    `queue` names the queue of models which live on a device together (`{backend}-{queue}`). `status` is
    stable or beta. `weights` is the folder that ships with the project, if any; otherwise the operator names one
    (`OMNIRT_MODEL_FOLDERS`), unless `needs` says that there are none. `loader` is None where a backend needs none
    (cpu-stub).

    `min_memory_bytes` is what the published weights take on a device with their default dtype, for documents; what
    is refused is counted from the weights that are really there, plus what the decoder works in: the fields from
    `working_bytes_per_pixel` to `tile_px`, as `footprint.Decoding` says.

    `adapters` and `quantisations` say what a model could take; no request may ask for them yet. `max_batch_size` and
    `batch_window_ms` are the model's own bounds on sharing forward passes (see Settings; the smaller size counts, and
    the window of a model that has one). `checkpointing` says when a job's state is kept, so that another attempt goes
    on there.
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
    working_bytes_per_pixel: int = 0
    working_bytes_per_film_pixel: int | None = None
    working_bytes_per_frame_pixel: int = 0
    working_dtype: str | None = None
    tile_px: int | None = None
    weights: Path | None = None
    revision: str = ""
    needs: Needs = Needs()
    loader: Loader | None = None
    verified: Verification = Verification.SPEC
    adapters: tuple[str, ...] = ()
    quantisations: tuple[str, ...] = ()
    max_batch_size: int | None = None
    batch_window_ms: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigurationError for bounds on sharing that are none."""
        if (self.max_batch_size is not None and self.max_batch_size < 1) or (self.batch_window_ms or 0) < 0:
            raise ConfigurationError(
                f"{self.id!r} has max_batch_size {self.max_batch_size} and batch_window_ms {self.batch_window_ms}.",
                "The first is at least 1, the second at least 0; None leaves them to the settings.",
            )

    checkpointing: Checkpointing | None = None
