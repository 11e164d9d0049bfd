"""How a model is run, by execution mode. An executor has not heard of Celery, nor of queues.

load(spec, request) ─► LoadedModel      once, shared by every job that needs these weights
run(model, order, job) ─► OutputFile…   once per job, in the job's own thread
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from omnirt_tasks.contract import Backend, ExecutionMode
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import LoadRequest, ModelSpec
from omnirt_tasks.registry.spec import Checkpointing
from workers.context import JobContext
from workers.host import OutputFile, RunOrder
from workers.loading import Sharing


def _nothing_to_end() -> None:
    """A model that is only memory goes with its last reference."""


@dataclass(frozen=True)
class LoadedModel:
    """What an executor loaded, for itself alone; `placement` maps each part to its device.

    `size_bytes` is what it takes of the device's memory. `close` ends what dropping it would not: processes.
    `checkpointing` says when its runs keep their state (None: never), `sharing` which of its calls jobs share.
    """

    content: Any = None
    placement: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    close: Callable[[], object] = _nothing_to_end
    checkpointing: Checkpointing | None = None
    sharing: Sharing = field(default_factory=Sharing)


class Executor(Protocol):
    """Loads models and runs jobs on them. Safe to share between threads."""

    def load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        """The model, ready to run on the request's device."""
        ...

    def run(self, model: LoadedModel, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
        """Run the job to its end, as the current job of the thread, and leave its outputs in the order's folder.

        Nothing of `model` is changed. Raises Interrupted, a JobError, or whatever the model's code raises.
        """
        ...


def executor_for(backend: str, mode: ExecutionMode) -> Executor:
    """The executor of a mode on a backend. Raises ConfigurationError for a mode that this worker cannot run."""
    if backend == Backend.CPU_STUB:
        from workers.executors.stub import StubExecutor

        return StubExecutor()
    if mode is ExecutionMode.MODULAR:
        from workers.executors.modular import ModularExecutor

        return ModularExecutor()
    if mode is ExecutionMode.LEGACY_CALL:
        from workers.executors.legacy_call import LegacyCallExecutor

        return LegacyCallExecutor()
    if mode is ExecutionMode.SUBPROCESS:
        from workers.executors.program import ProgramExecutor

        return ProgramExecutor()
    if mode is ExecutionMode.PERSISTENT_WORKER:
        from workers.executors.rank_group import RankGroupExecutor

        return RankGroupExecutor()
    raise ConfigurationError(f"This worker has no executor for the mode {mode.value!r}.", "Run the model elsewhere.")
