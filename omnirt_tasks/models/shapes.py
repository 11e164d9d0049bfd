"""`shapes`: the demonstration model that this project trains and ships; it draws a coloured shape on a background."""

from pathlib import Path

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.registry import options
from omnirt_tasks.registry.loading import load_diffusers
from omnirt_tasks.registry.runnable import DiffusersModel
from omnirt_tasks.registry.spec import Checkpointing, LoadRequest, ModelSpec, TaskSpec, Verification

SIZE_PX = 64


def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """The SDXL pipeline of the shipped weights; see `load_diffusers`."""
    return load_diffusers({Task.TEXT2IMAGE: "StableDiffusionXLPipeline"}, request)


SPECS = (
    ModelSpec(
        id="shapes",
        family="shapes",
        queue="shapes",
        summary="Draws 'a large red circle on a blue background', 64x64. A demonstration: eight shapes, ten colours.",
        tasks={
            Task.TEXT2IMAGE: TaskSpec(
                required_inputs=("prompt",),
                optional_inputs=("negative_prompt",),
                # It was trained on this one size; the fields are there so that a client may state it.
                options=options.picture_options(
                    SIZE_PX,
                    SIZE_PX,
                    minimum_px=SIZE_PX,
                    maximum_px=SIZE_PX,
                    steps=20,
                    guidance=7.5,
                    schedulers=options.SCHEDULERS,
                    dtype="fp32",
                    tiling=False,  # one tile covers its pictures
                ),
                artifact_kind=ArtifactKind.IMAGE,
            )
        },
        # On the CPU it takes well under a second, so that is where a job goes when nobody serves it yet.
        backends=(Backend.CPU, Backend.CUDA),
        execution_mode=ExecutionMode.LEGACY_CALL,
        tier=Tier.CORE,
        status="stable",
        weights=Path(__file__).parent / "weights" / "shapes",
        loader=load,
        verified=Verification.REAL_WEIGHTS,
        checkpointing=Checkpointing(every_steps=50),  # a job of the usual twenty is faster made again
    ),
)
