"""Wan 2.1: films from words. The weights are the operator's (`OMNIRT_MODEL_FOLDERS`)."""

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.registry import options
from omnirt_tasks.registry.decoders import (
    CAUSAL_FILM_BYTES_PER_PIXEL,
    CAUSAL_FRAME_BYTES_PER_PIXEL,
    CAUSAL_PICTURE_BYTES_PER_PIXEL,
    CAUSAL_TILE_PX,
)
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.presets import whichever
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import Checkpointing, LoadRequest, ModelSpec, Needs, TaskSpec, Verification

GIB = 1024**3
DTYPE = "bf16"


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """The pipeline and its blocks; see `load_diffusers`."""
    return load_diffusers({Task.TEXT2VIDEO: "WanPipeline"}, request, blocks="WanBlocks")


SPECS = (
    ModelSpec(
        id="wan2.1-t2v-14b",
        family="wan",
        queue="wan",
        summary="Wan 2.1: films of five seconds, in 480 or 720 lines.",
        tasks={
            Task.TEXT2VIDEO: TaskSpec(
                required_inputs=("prompt",),
                optional_inputs=("negative_prompt", "num_frames", "fps"),
                options=options.picture_options(
                    832,
                    480,
                    maximum_px=1280,
                    # Latents of 8x8 pixels, read by the transformer in patches of 2x2.
                    multiple_px=16,
                    steps=40,
                    guidance=5.0,
                    dtype=DTYPE,
                    per_job=1,
                    more=(options.max_sequence_length(512),),
                ),
                artifact_kind=ArtifactKind.VIDEO,
                # Trained in bf16: fp16, which the shared low-vram asks for, overflows and takes no less.
                presets=whichever(dtype=DTYPE),
                numbers=options.by_name((options.frames(81, 161), options.fps(16))),
            )
        },
        backends=(Backend.CUDA, Backend.ASCEND, Backend.CPU),
        execution_mode=ExecutionMode.MODULAR,
        tier=Tier.EXPERIMENTAL,
        status="beta",
        min_memory_bytes=18 * GIB,
        working_bytes_per_pixel=CAUSAL_PICTURE_BYTES_PER_PIXEL,
        working_bytes_per_film_pixel=CAUSAL_FILM_BYTES_PER_PIXEL,
        working_bytes_per_frame_pixel=CAUSAL_FRAME_BYTES_PER_PIXEL,
        tile_px=CAUSAL_TILE_PX,
        # Its blocks mend the prompt's text by it, and do not ask whether it is there.
        needs=Needs(packages=("ftfy",)),
        loader=load,
        verified=Verification.TINY_WEIGHTS,
        adapters=("lora",),
        checkpointing=Checkpointing(every_s=30),
    ),
)
