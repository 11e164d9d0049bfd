"""The models as a table in Markdown: what docs/models.md holds."""

from collections.abc import Iterable

from omnirt_tasks.registry.spec import Checkpointing, ModelSpec, Option, Verification

GIB = 1024**3
COLUMNS = ("model", "tasks", "mode", "queue", "backends", "memory", "verified", "options")
# Every model has them, so the column of its own options leaves them out.
COMMON_OPTIONS = frozenset({"preset", "seed"})
HEAD = """\
# Models

Written by `make docs` from the registry, the files under `omnirt_tasks/models`; [how to add one](add-a-model.md).

*Memory* is the device memory that the model is usually said to want, offloading included in some cases. It refuses
nothing: what is refused is counted from the weights that are really there, and from the size of the picture.

*Verified* says how far a model is known to work:

{levels}

Weights are the operator's, named in `OMNIRT_MODEL_FOLDERS`, but for `shapes`, which ships with the project, `stub`,
`flite` (a program) and `pocketsphinx` (a Python package with its model inside).
"""
LEVEL_WORDS = {
    Verification.SPEC: "its options and bounds are checked, it has run nowhere",
    Verification.TINY_WEIGHTS: "the real classes, loaded from a folder and run through the queue on a CPU",
    Verification.REAL_DEVICE: "the same on the device it is meant for",
    Verification.REAL_WEIGHTS: "what it makes was looked at, or measured",
}


def markdown(specs: Iterable[ModelSpec]) -> str:
    """The page: a table of every model by id, then the options of each task."""
    specs = sorted(specs, key=lambda spec: spec.id)
    levels = "\n".join(f"- *{level}*: {words}" for level, words in LEVEL_WORDS.items())
    table = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(_cells(spec)) for spec in specs)]
    return "\n".join([HEAD.format(levels=levels), *table, "", "## Options", "", *map(_options, specs)])


def _cells(spec: ModelSpec) -> list[str]:
    memory = f"{spec.min_memory_bytes / GIB:.1f} GiB" if spec.min_memory_bytes else "little"
    names = " ".join([f"`{spec.id}`", *(f"(`{alias}`)" for alias in spec.aliases)])
    backends = ", ".join(spec.backends)
    options = dict.fromkeys(name for its in spec.tasks.values() for name in its.options if name not in COMMON_OPTIONS)
    tasks = ", ".join(spec.tasks)
    return [names, tasks, spec.execution_mode, spec.queue, backends, memory, spec.verified, ", ".join(options)]


def _options(spec: ModelSpec) -> str:
    lines = [f"**`{spec.id}`**: {spec.summary}{_kept(spec.checkpointing)}", ""]
    for task, its in spec.tasks.items():
        inputs = [*(f"{name} (needed)" for name in its.required_inputs), *its.optional_inputs]
        fields = [
            *its.numbers.values(),
            *(option for option in its.options.values() if option.name not in COMMON_OPTIONS),
        ]
        told = f" Options: {', '.join(map(_told, fields))}." if fields else ""
        lines.append(f"- {task}: inputs {', '.join(inputs)}.{told}")
    return "\n".join([*lines, ""])


def _kept(checkpointing: Checkpointing | None) -> str:
    if checkpointing is None:
        return ""
    times = []
    if checkpointing.every_steps is not None:
        times.append(f"{checkpointing.every_steps} steps")
    if checkpointing.every_s is not None:
        times.append(f"{checkpointing.every_s:g} s")
    return f" A job's state is kept every {' or '.join(times)}."


def _told(option: Option) -> str:
    if option.choices is not None:
        bounds = f" ({', '.join(option.choices)})"
    elif option.minimum is not None and option.maximum is not None:
        bounds = f" ({option.minimum} to {option.maximum}{' ' + option.unit if option.unit else ''})"
    else:
        bounds = ""
    default = "" if option.default is None else f" = {str(option.default).lower()}"
    return f"`{option.name}`{default}{bounds}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
