"""Qwen-Image. The weights are the operator's (`OMNIRT_MODEL_FOLDERS`)."""

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.registry import options
from omnirt_tasks.registry.decoders import CAUSAL_PICTURE_BYTES_PER_PIXEL, CAUSAL_TILE_PX
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.presets import whichever
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import Checkpointing, LoadRequest, ModelSpec, TaskSpec, Verification

GIB = 1024**3
DTYPE = "bf16"


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """The pipeline and its blocks; see `load_diffusers`."""
    return load_diffusers({Task.TEXT2IMAGE: "QwenImagePipeline"}, request, blocks="QwenImageAutoBlocks")


SPECS = (
    ModelSpec(
        id="qwen-image",
        family="qwen-image",
        queue="qwen-image",
        summary="Qwen-Image: pictures of about a megapixel, with text in them, Chinese too.",
        tasks={
            Task.TEXT2IMAGE: TaskSpec(
                required_inputs=("prompt",),
                optional_inputs=("negative_prompt",),
                options=options.picture_options(
                    1024,
                    1024,
                    maximum_px=2048,
                    # Latents of 8x8 pixels, packed two by two.
                    multiple_px=16,
                    steps=40,
                    guidance=None,
                    dtype=DTYPE,
                    more=(options.true_cfg_scale(4.0), options.max_sequence_length(512, 1024)),
                ),
                artifact_kind=ArtifactKind.IMAGE,
                # Trained in bf16: fp16, which the shared low-vram asks for, overflows and takes no less.
                presets=whichever(dtype=DTYPE),
            )
        },
        backends=(Backend.CUDA, Backend.ASCEND, Backend.CPU),
        execution_mode=ExecutionMode.LEGACY_CALL,
        tier=Tier.ADJACENT,
        status="beta",
        min_memory_bytes=24 * GIB,
        working_bytes_per_pixel=CAUSAL_PICTURE_BYTES_PER_PIXEL,
        tile_px=CAUSAL_TILE_PX,
        loader=load,
        verified=Verification.TINY_WEIGHTS,
        adapters=("lora",),
        checkpointing=Checkpointing(every_s=30),
    ),
)
