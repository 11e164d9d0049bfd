"""Flux: dev and schnell. The weights are the operator's (`OMNIRT_MODEL_FOLDERS`)."""

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
# Latents of 8x8 pixels, packed two by two.
SIZE_MULTIPLE_PX = 16
DTYPE = "bf16"


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """The pipeline and its blocks; see `load_diffusers`."""
    return load_diffusers({Task.TEXT2IMAGE: "FluxPipeline"}, request, blocks="FluxAutoBlocks")


def _model(
    model_id: str, summary: str, *, steps: int, guidance: float, tokens: int, own: JsonObject, tier: Tier, gib: int
) -> ModelSpec:
    task = TaskSpec(
        required_inputs=("prompt",),
        # Taken because clients send it; a model whose guidance is distilled has nothing to hold against the prompt.
        optional_inputs=("negative_prompt",),
        options=options.picture_options(
            SIZE_PX,
            SIZE_PX,
            maximum_px=SIZE_MAX_PX,
            multiple_px=SIZE_MULTIPLE_PX,
            steps=steps,
            guidance=guidance,
            dtype=DTYPE,
            more=(options.max_sequence_length(tokens, tokens),),
        ),
        artifact_kind=ArtifactKind.IMAGE,
        # Its text encoder overflows in fp16, which the shared low-vram asks for; bf16 takes no more.
        presets=whichever(**own, guidance_scale=guidance, dtype=DTYPE),
    )
    return ModelSpec(
        id=model_id,
        family="flux",
        queue="flux",
        summary=summary,
        tasks={Task.TEXT2IMAGE: task},
        backends=(Backend.CUDA, Backend.ASCEND, Backend.CPU),
        execution_mode=ExecutionMode.MODULAR,
        tier=tier,
        status="stable",
        min_memory_bytes=gib * GIB,
        working_bytes_per_pixel=KL_F8_BYTES_PER_PIXEL,
        tile_px=SIZE_PX,
        loader=load,
        verified=Verification.TINY_WEIGHTS,
        adapters=("lora",),
        checkpointing=Checkpointing(every_s=30),
    )


SPECS = (
    _model(
        "flux-dev",
        "Flux dev: pictures of about a megapixel; its guidance is distilled, and negative prompts have no effect.",
        steps=28,
        guidance=3.5,
        tokens=512,
        own={},
        tier=Tier.ADJACENT,
        gib=24,
    ),
    _model(
        "flux-schnell",
        "Flux distilled to four steps without guidance; negative prompts have no effect.",
        steps=4,
        guidance=0.0,
        tokens=256,
        own={"num_inference_steps": 4},
        tier=Tier.EXPERIMENTAL,
        gib=20,
    ),
)
