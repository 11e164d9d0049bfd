"""`flite`: English speech by the small synthesiser of that name, which the host has installed."""

from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.registry import options
from omnirt_tasks.registry.runnable import Program, ProgramRun
from omnirt_tasks.registry.spec import LoadRequest, ModelSpec, Needs, Option, OptionKind, TaskSpec, Verification

VOICES = ("slt", "rms", "awb", "kal", "kal16")


def load(spec: ModelSpec, request: LoadRequest) -> Program:
    """The program; nothing is loaded."""
    return Program(_command, ArtifactKind.AUDIO, output_name="0.wav", mime="audio/wav")


def _command(run: ProgramRun) -> list[str]:
    speed = run.config["speed"]
    assert isinstance(speed, float), "a resolved request has a speed"
    return [
        *("flite", "-voice", str(run.config["voice"]), "--setf", f"duration_stretch={1 / speed:.4f}"),
        *("-f", str(run.prompt_file), "-o", str(run.output)),
    ]


SPECS = (
    ModelSpec(
        id="flite",
        family="flite",
        queue="speech",
        summary="Speaks English text aloud, in five voices; fast on any CPU, and plainly a machine.",
        tasks={
            Task.TEXT2AUDIO: TaskSpec(
                required_inputs=("prompt",),
                optional_inputs=(),
                options=options.by_name(
                    (
                        options.preset(),
                        Option("voice", OptionKind.TEXT, "slt", "Who speaks; slt is the clearest.", choices=VOICES),
                        Option("speed", OptionKind.NUMBER, 1.0, "How fast, against the voice's own pace.", 0.5, 2.0),
                    )
                ),
                artifact_kind=ArtifactKind.AUDIO,
            )
        },
        backends=(Backend.CPU,),
        execution_mode=ExecutionMode.SUBPROCESS,
        tier=Tier.EXPERIMENTAL,
        status="beta",
        needs=Needs(weights=False, programs=("flite",)),
        loader=load,
        verified=Verification.REAL_WEIGHTS,
    ),
)
