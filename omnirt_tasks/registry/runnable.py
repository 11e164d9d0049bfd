"""What a family's loader gives to the executor of its execution mode: one type for each way to run a model.

    DiffusersModel   modular, legacy_call     pipelines around one set of components, in the device's process
    Program          subprocess               an installed program, started anew for each job
    RankGroup        persistent_worker        processes of its own, started once and spoken to

The types hold no torch; the values of a DiffusersModel do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from omnirt_tasks.contract import ArtifactKind, Inputs, Task
from omnirt_tasks.contract.base import JsonObject


@dataclass(frozen=True)
class DiffusersModel:
    """A classic pipeline for each of the model's tasks, all around one set of components on the device.

    `blocks` names the class of Modular Diffusers that does the same with these components, for the mode `modular`.
    """

    by_task: Mapping[Task, Any]
    blocks: str | None = None

    @property
    def components(self) -> Mapping[str, Any]:
        """The components by name, the same for every task."""
        components: Mapping[str, Any] = next(iter(self.by_task.values())).components
        return components


@dataclass(frozen=True)
class ProgramRun:
    """One run of a program: `prompt_file` holds the prompt as UTF-8, `files` the inputs, `output` is to be written."""

    prompt_file: Path
    files: Mapping[str, Path]
    output: Path
    config: JsonObject


@dataclass(frozen=True)
class Program:
    """An installed program. `command` gives its whole command line; it holds no text of a caller's: prompts are files.

    It leaves one file of `kind`, named `output_name`, of MIME type `mime`. Progress is not known, so none is told.
    """

    command: Callable[[ProgramRun], Sequence[str]]
    kind: ArtifactKind
    output_name: str
    mime: str


class Launcher(StrEnum):
    """What starts the processes of a rank group."""

    PYTHON = "python"  # one rank, without torch
    TORCHRUN = "torchrun"
    ACCELERATE = "accelerate"


@dataclass(frozen=True)
class RankGroup:
    """Processes that keep one model and run one job at a time, together.

    `entry` is "module:Class" of a `RankModel`, which every rank makes once and calls for every job. Where there are
    several, `torch.distributed` is set up before: gloo for the CPU, and the device's own backend beside it.
    """

    entry: str
    ranks: int = 1
    launcher: Launcher = Launcher.PYTHON


@dataclass(frozen=True)
class RankStart:
    """What a rank makes its model from; `rank` counts from 0 to `ranks` - 1, and `device` is the rank's own."""

    folder: Path
    device: str
    dtype: str
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class RankJob:
    """One job as every rank gets it; the files are there for all, and `output_dir` is written by rank 0 alone.

    `tell(step, total)` says how far it is, from 1; it raises when the job is to stop, in every rank at the same step.
    """

    task: Task
    inputs: Inputs
    config: JsonObject
    files: Mapping[str, Path]
    output_dir: Path
    tell: Callable[[int, int], None] = field(compare=False)


@dataclass(frozen=True)
class RankOutput:
    """A file that rank 0 left in the job's `output_dir`."""

    name: str
    kind: ArtifactKind
    mime: str
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None


class RankModel(Protocol):
    """A family's model as one rank keeps it. It is made and called in the first thread of the rank's process."""

    def __init__(self, start: RankStart) -> None:
        """Load the rank's part."""
        ...

    def run(self, job: RankJob) -> Sequence[RankOutput]:
        """The rank's part of the job; what rank 0 returns counts.

        Raises a JobError or CallerError for what the job's caller is to know, in every rank; what `job.tell` raises is
        to be let through.
        """
        ...


Runnable = DiffusersModel | Program | RankGroup
