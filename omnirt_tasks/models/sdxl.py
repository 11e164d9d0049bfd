"""Stable Diffusion XL: base, refiner and turbo. The weights are the operator's (`OMNIRT_MODEL_FOLDERS`)."""

from collections.abc import Mapping

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.registry import options
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import Checkpointing, LoadRequest, ModelSpec, TaskSpec, Verification

GIB = 1024**3
SIZE_PX = 1024
SIZE_MAX_PX = 2048
# Measured: at its widest, decoding holds three maps of 256 channels for each pixel. In four bytes, whatever the dtype:
# this VAE overflows in half precision, and is kept in fp32.
WORKING_BYTES_PER_PIXEL = 3_088

_CLASSES = {
    Task.TEXT2IMAGE: "StableDiffusionXLPipeline",
    Task.IMAGE2IMAGE: "StableDiffusionXLImg2ImgPipeline",
    Task.INPAINT: "StableDiffusionXLInpaintPipeline",
}


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """A pipeline for each task and their blocks, from a classic folder of safetensors; see `load_diffusers`."""
    return load_diffusers({task: _CLASSES[task] for task in spec.tasks}, request, blocks="StableDiffusionXLAutoBlocks")


def _task(
    *pictures: str,
    strength: float | None = None,
    steps: int = 30,
    guidance: float = 7.5,
    scheduler: str = "euler-discrete",
    presets: Mapping[str, JsonObject] | None = None,
) -> TaskSpec:
    return TaskSpec(
        required_inputs=(*pictures, "prompt"),
        optional_inputs=("negative_prompt",),
        options=options.picture_options(
            SIZE_PX,
            SIZE_PX,
            maximum_px=SIZE_MAX_PX,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            schedulers=options.SCHEDULERS,
            strength=strength,
        ),
        artifact_kind=ArtifactKind.IMAGE,
        presets=presets or {},
    )


def _model(model_id: str, summary: str, tasks: Mapping[Task, TaskSpec], tier: Tier, status: str, gib: int) -> ModelSpec:
    return ModelSpec(
        id=model_id,
        family="sdxl",
        queue="sdxl",
        summary=summary,
        tasks=tasks,
        backends=(Backend.CUDA, Backend.ASCEND, Backend.CPU),
        execution_mode=ExecutionMode.MODULAR,
        tier=tier,
        status=status,
        min_memory_bytes=gib * GIB,
        working_bytes_per_pixel=WORKING_BYTES_PER_PIXEL,
        working_dtype="fp32",
        tile_px=SIZE_PX,
        loader=load,
        verified=Verification.TINY_WEIGHTS,
        adapters=("lora",),
        checkpointing=Checkpointing(every_s=30),
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
            Task.TEXT2IMAGE: _task(),
            Task.IMAGE2IMAGE: _task("image", strength=0.8),
            Task.INPAINT: _task("image", "mask", strength=1.0),
        },
        tier=Tier.ADJACENT,
        status="stable",
        gib=12,
    ),
    _model(
        "sdxl-refiner-1.0",
        "Stable Diffusion XL refiner: adds detail to a picture.",
        {Task.IMAGE2IMAGE: _task("image", strength=0.3)},
        tier=Tier.ADJACENT,
        status="beta",
        gib=12,
    ),
    _model(
        "sdxl-turbo",
        "Stable Diffusion XL distilled to one to four steps.",
        {Task.TEXT2IMAGE: _task(steps=4, guidance=0.0, scheduler="euler-ancestral", presets=_TURBO_PRESETS)},
        tier=Tier.EXPERIMENTAL,
        status="beta",
        gib=10,
    ),
)
