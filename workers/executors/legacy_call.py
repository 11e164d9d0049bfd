"""Runs any classic diffusers pipeline through its `__call__`.

Shared by all jobs: the weights. A job's own: pipeline object, scheduler, generators, and, while it runs, tokenizers.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omnirt_tasks.contract import Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.registry import DiffusersModel
from workers.checkpoints import CheckpointWriter
from workers.context import JobContext
from workers.executors.diffusers_parts import DiffusersExecutor, Lender, call_arguments, own_components
from workers.host import RunOrder


@dataclass(frozen=True)
class SharedPipelines:
    """The pipelines of a model's tasks around the same weights; never changed, never called."""

    by_task: Mapping[Task, Any]
    tokenizers: Lender


class LegacyCallExecutor(DiffusersExecutor[SharedPipelines]):
    """Runs each job on a copy of its own of its task's pipeline."""

    def _shared(self, loaded: DiffusersModel, tokenizers: Lender) -> SharedPipelines:
        return SharedPipelines(loaded.by_task, tokenizers)

    def _call(self, shared: SharedPipelines, order: RunOrder, job: JobContext, checkpoints: CheckpointWriter) -> Any:
        from workers.executors.steps import count_steps

        with shared.tokenizers.lent() as tokenizers:
            pipeline = own_pipeline(shared.by_task[order.request.task], tokenizers, order.request.config)
            arguments = call_arguments(inspect.signature(type(pipeline).__call__).parameters, order)
            generators = arguments.get("generator", ())
            count_steps(pipeline.scheduler, getattr(pipeline, "vae", None), job, generators, checkpoints)
            result = pipeline(**arguments)
        return result.frames if hasattr(result, "frames") else result.images


def own_pipeline(shared: Any, tokenizers: Mapping[str, Any], config: JsonObject) -> Any:
    """A job's own pipeline around the shared weights; its scheduler is its own too, since that counts its steps."""
    components = own_components(shared.components, tokenizers, config)
    # Plain values of a pipeline's own configuration (force_zeros_for_empty_prompt) go along with its components.
    plain = {
        name: shared.config[name]
        for name in inspect.signature(type(shared).__init__).parameters
        if name not in components and name in shared.config
    }
    pipeline = type(shared)(**components, **plain)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
