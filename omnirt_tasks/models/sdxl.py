"""Stable Diffusion XL: base, refiner and turbo. The weights are the operator's (`OMNIRT_MODEL_FOLDERS`)."""

from collections.abc import Mapping
from typing import Any

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.registry import options
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import LoadRequest, ModelSpec, Option, TaskSpec

GIB = 1024**3
SIZE_MAX_PX = 2048
SCHEDULERS = ("euler-discrete", "ddim", "dpm-solver", "euler-ancestral", "native")

_CLASSES = {
    Task.TEXT2IMAGE: "StableDiffusionXLPipeline",
    Task.IMAGE2IMAGE: "StableDiffusionXLImg2ImgPipeline",
    Task.INPAINT: "StableDiffusionXLInpaintPipeline",
}


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """A pipeline for each task, from a classic folder of safetensors. Raises OSError when the folder is not whole."""
    return load_diffusers({task: _CLASSES[task] for task in spec.tasks}, request)


def _task(
    task: Task,
    *,
    strength: float = 0.0,
    steps: int = 30,
    guidance: float = 7.5,
    scheduler: str = "euler-discrete",
    **more: Any,
) -> TaskSpec:
    pictures = {Task.TEXT2IMAGE: (), Task.IMAGE2IMAGE: ("image",), Task.INPAINT: ("image", "mask")}[task]
    fields: list[Option] = [
        options.preset(),
        options.seed(),
        options.steps(steps),
        options.guidance(guidance),
        options.pictures(),
        options.size("width", 1024, maximum_px=SIZE_MAX_PX),
        options.size("height", 1024, maximum_px=SIZE_MAX_PX),
        options.scheduler(scheduler, SCHEDULERS),
        options.dtype("fp16"),
    ]
    if pictures:
        fields.append(options.strength(strength))
    return TaskSpec(
        required_inputs=(*pictures, "prompt"),
        optional_inputs=("negative_prompt",),
        options=options.by_name(fields),
        artifact_kind=ArtifactKind.IMAGE,
        **more,
    )


def _model(model_id: str, summary: str, tasks: Mapping[Task, TaskSpec], tier: Tier, status: str, gib: int) -> ModelSpec:
    return ModelSpec(
        id=model_id,
        family="sdxl",
        queue="sdxl",
        summary=summary,
        tasks=tasks,
        backends=(Backend.CUDA, Backend.ASCEND, Backend.CPU),
        execution_mode=ExecutionMode.LEGACY_CALL,
        tier=tier,
        status=status,
        min_memory_bytes=gib * GIB,
        loader=load,
    )


# Distilled to a few steps without guidance: the shared presets would spoil its pictures.
_TURBO_PRESETS: Mapping[str, JsonObject] = {
    "fast": {"num_inference_steps": 1, "guidance_scale": 0.0},
    "balanced": {"num_inference_steps": 4, "guidance_scale": 0.0},
    "quality": {"num_inference_steps": 8, "guidance_scale": 0.0},
    "low-vram": {"num_inference_steps": 1, "guidance_scale": 0.0},
}

SPECS = (
    _model(
        "sdxl-base-1.0",
        "Stable Diffusion XL base: pictures of about a megapixel.",
        {
            Task.TEXT2IMAGE: _task(Task.TEXT2IMAGE),
            Task.IMAGE2IMAGE: _task(Task.IMAGE2IMAGE, strength=0.8),
            Task.INPAINT: _task(Task.INPAINT, strength=1.0),
        },
        tier=Tier.ADJACENT,
        status="stable",
        gib=12,
    ),
    _model(
        "sdxl-refiner-1.0",
        "Stable Diffusion XL refiner: adds detail to a picture.",
        {Task.IMAGE2IMAGE: _task(Task.IMAGE2IMAGE, strength=0.3)},
        tier=Tier.ADJACENT,
        status="beta",
        gib=12,
    ),
    _model(
        "sdxl-turbo",
        "Stable Diffusion XL distilled to one to four steps.",
        {
            Task.TEXT2IMAGE: _task(
                Task.TEXT2IMAGE, steps=4, guidance=0.0, scheduler="euler-ancestral", presets=_TURBO_PRESETS
            )
        },
        tier=Tier.EXPERIMENTAL,
        status="beta",
        gib=10,
    ),
)
