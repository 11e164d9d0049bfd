"""Stable Diffusion 1.5. The weights are the operator's (`OMNIRT_MODEL_FOLDERS`)."""

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.registry import options
from omnirt_tasks.registry.decoders import KL_F8_BYTES_PER_PIXEL
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import Checkpointing, LoadRequest, ModelSpec, TaskSpec, Verification

GIB = 1024**3
SIZE_PX = 512

_CLASSES = {
    Task.TEXT2IMAGE: "StableDiffusionPipeline",
    Task.IMAGE2IMAGE: "StableDiffusionImg2ImgPipeline",
    Task.INPAINT: "StableDiffusionInpaintPipeline",
}


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """A pipeline for each task; see `load_diffusers`."""
    return load_diffusers(_CLASSES, request)


def _task(*pictures: str, strength: float | None = None) -> TaskSpec:
    return TaskSpec(
        required_inputs=(*pictures, "prompt"),
        optional_inputs=("negative_prompt",),
        options=options.picture_options(
            SIZE_PX,
            SIZE_PX,
            maximum_px=1024,
            steps=30,
            guidance=7.5,
            scheduler="euler-discrete",
            schedulers=options.SCHEDULERS,
            strength=strength,
        ),
        artifact_kind=ArtifactKind.IMAGE,
    )


SPECS = (
    ModelSpec(
        id="sd15",
        family="sd15",
        queue="sd15",
        summary="Stable Diffusion 1.5: small and quick, pictures of 512x512.",
        tasks={
            Task.TEXT2IMAGE: _task(),
            Task.IMAGE2IMAGE: _task("image", strength=0.8),
            Task.INPAINT: _task("image", "mask", strength=1.0),
        },
        backends=(Backend.CUDA, Backend.ASCEND, Backend.CPU),
        execution_mode=ExecutionMode.LEGACY_CALL,
        tier=Tier.EXPERIMENTAL,
        status="beta",
        min_memory_bytes=6 * GIB,
        working_bytes_per_pixel=KL_F8_BYTES_PER_PIXEL,
        tile_px=SIZE_PX,
        loader=load,
        verified=Verification.TINY_WEIGHTS,
        adapters=("lora",),
        checkpointing=Checkpointing(every_s=30),
    ),
)
