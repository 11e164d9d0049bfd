"""Stable Diffusion 3 and 3.5. The weights are the operator's (`OMNIRT_MODEL_FOLDERS`)."""

from collections.abc import Mapping

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.registry import options
from omnirt_tasks.registry.decoders import KL_F8_BYTES_PER_PIXEL
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.presets import whichever
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import Checkpointing, LoadRequest, ModelSpec, TaskSpec, Verification

GIB = 1024**3
SIZE_PX = 1024
SIZE_MAX_PX = 2048
# Latents of 8x8 pixels, read by the transformer in patches of 2x2.
SIZE_MULTIPLE_PX = 16
TOKENS = 256


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """The pipeline and its blocks; see `load_diffusers`."""
    classes = {Task.TEXT2IMAGE: "StableDiffusion3Pipeline"}
    return load_diffusers(classes, request, blocks="StableDiffusion3AutoBlocks")


def _model(
    model_id: str, summary: str, *, steps: int, guidance: float, presets: Mapping[str, JsonObject] | None = None
) -> ModelSpec:
    task = TaskSpec(
        required_inputs=("prompt",),
        optional_inputs=("negative_prompt",),
        options=options.picture_options(
            SIZE_PX,
            SIZE_PX,
            maximum_px=SIZE_MAX_PX,
            multiple_px=SIZE_MULTIPLE_PX,
            steps=steps,
            guidance=guidance,
            more=(options.max_sequence_length(TOKENS),),
        ),
        artifact_kind=ArtifactKind.IMAGE,
        presets=presets or {},
    )
    return ModelSpec(
        id=model_id,
        family="sd3",
        queue="sd3",
        summary=summary,
        tasks={Task.TEXT2IMAGE: task},
        backends=(Backend.CUDA, Backend.ASCEND, Backend.CPU),
        execution_mode=ExecutionMode.LEGACY_CALL,
        tier=Tier.EXPERIMENTAL,
        status="beta",
        min_memory_bytes=24 * GIB,
        working_bytes_per_pixel=KL_F8_BYTES_PER_PIXEL,
        tile_px=SIZE_PX,
        loader=load,
        verified=Verification.TINY_WEIGHTS,
        adapters=("lora",),
        checkpointing=Checkpointing(every_s=30),
    )


SPECS = (
    _model(
        "sd3-medium",
        "Stable Diffusion 3 medium: pictures of about a megapixel, with words in them.",
        steps=28,
        guidance=7.5,
    ),
    _model(
        "sd3.5-large",
        "Stable Diffusion 3.5 large: pictures of about a megapixel, of the family's best quality.",
        steps=28,
        guidance=7.5,
    ),
    _model(
        "sd3.5-large-turbo",
        "Stable Diffusion 3.5 large, distilled to four steps without guidance.",
        steps=4,
        guidance=0.0,
        presets=whichever(num_inference_steps=4, guidance_scale=0.0),
    ),
)
