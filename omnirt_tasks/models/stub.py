"""`stub`: a model without a model, on the backend cpu-stub, for tests, drills and benchmarks; it needs no torch."""

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.registry import options
from omnirt_tasks.registry.spec import ModelSpec, Option, OptionKind, TaskSpec

HOUR_MS = 3_600_000
CRASHES = ("kill", "segv", "exit", "abort", "memory", "hold-gil")


def _at_step(name: str, summary: str) -> Option:
    return Option(name, OptionKind.INTEGER, None, summary, minimum=1, maximum=options.STEPS_MAX, nullable=True)


SPECS = (
    ModelSpec(
        id="stub",
        family="stub",
        queue="stub",
        summary="Small pictures made from the prompt's hash, with costs and failures on order.",
        tasks={
            Task.TEXT2IMAGE: TaskSpec(
                required_inputs=("prompt",),
                optional_inputs=("negative_prompt",),
                options=options.by_name(
                    (
                        options.preset(),
                        options.seed(),
                        options.steps(8),
                        options.guidance(),
                        options.pictures(),
                        options.size("width", 64, maximum_px=512),
                        options.size("height", 64, maximum_px=512),
                        options.device(),
                        Option("step_ms", OptionKind.NUMBER, 0.0, "What a step costs.", 0, HOUR_MS, unit="ms"),
                        Option(
                            "item_ms", OptionKind.NUMBER, 0.0, "What each member adds to a step.", 0, HOUR_MS, unit="ms"
                        ),
                        _at_step("fail_at_step", "The step that raises."),
                        Option("non_finite", OptionKind.BOOLEAN, False, "Whether the output holds NaN."),
                        Option(
                            "oom_above_chunk",
                            OptionKind.INTEGER,
                            None,
                            "The largest number of pictures in one forward pass that fits.",
                            minimum=0,
                            maximum=options.PICTURES_MAX,
                            nullable=True,
                        ),
                        _at_step("stall_at_step", "The step before which the job idles off the device, for stall_ms."),
                        Option("stall_ms", OptionKind.NUMBER, 1_000.0, "How long it idles.", 0, HOUR_MS, unit="ms"),
                        _at_step("checkpoint_every_steps", "Every how many steps its state is kept."),
                        _at_step("hang_at_step", "The step that never returns."),
                        _at_step("crash_at_step", "The step that ends its process, or holds it for ever."),
                        Option("crash", OptionKind.TEXT, "kill", "How that step does it.", choices=CRASHES),
                        Option(
                            "crash_attempts",
                            OptionKind.INTEGER,
                            1_000,
                            "The last attempt that does it.",
                            minimum=1,
                            maximum=1_000,
                        ),
                    )
                ),
                artifact_kind=ArtifactKind.IMAGE,
            )
        },
        backends=(Backend.CPU_STUB,),
        execution_mode=ExecutionMode.LEGACY_CALL,
        tier=Tier.EXPERIMENTAL,
        status="stable",
    ),
)
