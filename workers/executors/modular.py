"""Runs pipelines of Modular Diffusers: blocks around the components that a family's loader gives.

Shared by all jobs: the weights and the blocks, which hold no state. A job's own: pipeline object, scheduler, guider,
generators, and, while it runs, tokenizers.
"""

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omnirt_tasks.contract import Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import DiffusersModel
from omnirt_tasks.registry.work import count_pictures
from workers.checkpoints import CheckpointWriter
from workers.context import JobContext
from workers.executors.diffusers_parts import (
    DiffusersExecutor,
    Lender,
    call_arguments,
    own_components,
)
from workers.host import RunOrder

# What a pipeline's last block calls its output.
OUTPUTS = ("images", "videos")


@dataclass(frozen=True)
class SharedBlocks:
    """A pipeline around the shared weights that is copied for each job; never changed, never called.

    `inputs` are the names that its blocks take, `output` the one that they give, `defaults` what the classic pipeline
    of each task takes unless told otherwise: the blocks' own differ here and there.
    """

    pipeline: Any
    inputs: frozenset[str]
    defaults: Mapping[Task, Mapping[str, Any]]
    output: str
    tokenizers: Lender


class ModularExecutor(DiffusersExecutor[SharedBlocks]):
    """Runs each job on a modular pipeline of its own, with the picture that the classic one gives."""

    def _shared(self, loaded: DiffusersModel, tokenizers: Lender) -> SharedBlocks:
        if loaded.blocks is None:
            raise ConfigurationError("The model names no modular blocks.", "Run it in the mode legacy_call.")
        import diffusers

        blocks = getattr(diffusers, loaded.blocks)()
        for loop in _loops(blocks):
            loop.set_progress_bar_config(disable=True)
        pipeline = blocks.init_pipeline()
        classic = next(iter(loaded.by_task.values()))
        names = (*pipeline.component_names, *(spec.name for spec in blocks.expected_configs))
        known = {**classic.config, **classic.components}
        pipeline.update_components(**{name: known[name] for name in names if known.get(name) is not None})
        inputs = frozenset(blocks.input_names)
        gives = {output.name for output in blocks.outputs}
        return SharedBlocks(
            pipeline,
            inputs=inputs,
            defaults={task: _defaults(pipeline, inputs) for task, pipeline in loaded.by_task.items()},
            output=next(name for name in OUTPUTS if name in gives),
            tokenizers=tokenizers,
        )

    def _call(self, shared: SharedBlocks, order: RunOrder, job: JobContext, checkpoints: CheckpointWriter) -> Any:
        from workers.executors.steps import count_steps

        with shared.tokenizers.lent() as tokenizers:
            pipeline = own_pipeline(shared.pipeline, tokenizers, order)
            arguments = _arguments(pipeline, shared, order)
            generators = arguments.get("generator", ())
            count_steps(pipeline.scheduler, getattr(pipeline, "vae", None), job, generators, checkpoints)
            return pipeline(**arguments, output=shared.output)


def own_pipeline(shared: Any, tokenizers: Mapping[str, Any], order: RunOrder) -> Any:
    """A job's own pipeline; scheduler and guider are its own too, since they keep count of its steps."""
    pipeline = copy.copy(shared)
    config = order.request.config
    components = own_components(shared.components, tokenizers, config)
    if (guider := components.get("guider")) is not None:
        components["guider"] = _own_guider(guider, config)
    if order.request.task is Task.INPAINT:
        components["vae"] = _vae_of_inpainting(components["vae"], count_pictures(order.request))
    for name, component in components.items():
        setattr(pipeline, name, component)
    return pipeline


def _defaults(classic: Any, inputs: frozenset[str]) -> dict[str, Any]:
    parameters = inspect.signature(type(classic).__call__).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name in inputs and parameter.default is not None and parameter.default is not parameter.empty
    }


def _arguments(pipeline: Any, shared: SharedBlocks, order: RunOrder) -> dict[str, Any]:
    inputs = shared.inputs
    given = {**shared.defaults[order.request.task], **call_arguments(inputs, order)}
    if "negative_prompt" in inputs and not pipeline.config.get("force_zeros_for_empty_prompt", False):
        # As classic pipelines do; some blocks guide away from nothing at all.
        prompt = given.get("prompt")
        given.setdefault("negative_prompt", [""] * len(prompt) if isinstance(prompt, list) else "")
    if "dtype" in inputs:  # else the blocks take the VAE's, which may be kept in fp32
        given["dtype"] = pipeline.unet.dtype
    return given


def _own_guider(guider: Any, config: JsonObject) -> Any:
    scale = config.get("true_cfg_scale", config.get("guidance_scale"))
    assert isinstance(scale, int | float), "a model with a guider has a scale among its options"
    if scale > 1:
        return guider.new(guidance_scale=scale)
    # As classic pipelines see it, that is no guidance. It ends before the first step, rather than being disabled: some
    # blocks break when there is nothing to guide away from.
    return guider.new(stop=0.0)


def _vae_of_inpainting(vae: Any, pictures: int) -> Any:
    """A job's own VAE that has the seeds used up in the order of the classic pipelines.

    Those draw what the picture begins with before they encode the masked picture, and the blocks after it.
    """
    own = copy.copy(vae)
    encode = vae.encode
    encoded = 0

    @functools.wraps(encode)
    def in_order(*args: Any, **kwargs: Any) -> Any:
        nonlocal encoded
        result = encode(*args, **kwargs)
        encoded += 1
        if encoded > pictures:  # first the pictures themselves, then the masked ones
            _sample_after_noise(result.latent_dist)
        return result

    own.encode = in_order
    return own


def _sample_after_noise(distribution: Any) -> None:
    sample = distribution.sample

    def after_noise(generator: Any = None) -> Any:
        import torch

        ahead = generator.clone_state()
        torch.randn(distribution.mean.shape, generator=ahead)
        return sample(ahead)

    distribution.sample = after_noise


def _loops(blocks: Any) -> Iterator[Any]:
    """Every block that shows a progress bar."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            yield block
        yield from _loops(block)
