"""From a GenerateRequest to what will run: the model's spec, the presets, the bounds."""

import difflib
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from omnirt_tasks.contract import (
    AUTO,
    MEDIA_INPUTS,
    Backend,
    GenerateRequest,
    Inputs,
    Problem,
    ResolvedRequest,
    Tier,
)
from omnirt_tasks.errors import BackendUnsupported, ModelNotFound, ModelTierDisabled, StubDisabled
from omnirt_tasks.registry import presets
from omnirt_tasks.registry.catalog import Catalog
from omnirt_tasks.registry.options import COUNT_OPTION
from omnirt_tasks.registry.spec import SEED_MAX, ModelSpec, Option, OptionKind, TaskSpec
from omnirt_tasks.validation.findings import Finding, failure, listed, shown, unknown_field
from omnirt_tasks.validation.texts import PROMPT, TEXTS, check_pictures, check_prompts, count_prompts, text_problem

DRAWN_SEED_MAX = 2**32 - 1  # a drawn seed stays short enough to be typed again

_REFERENCE = re.compile(
    r"upload:[A-Za-z0-9][A-Za-z0-9-]{0,63}|artifact:[A-Za-z0-9-]{1,64}/[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
)
DATA_URL = re.compile(r"data:(?P<mime>[a-z]+/[a-z0-9.+-]+);base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Door:
    """What the door that a request came through allows."""

    allow_stub: bool = True
    disabled_tiers: tuple[Tier, ...] = ()


@dataclass(frozen=True)
class Resolution:
    """What came of a request: the resolved one (`spec` is its model's), or findings and no request."""

    request: ResolvedRequest | None
    spec: ModelSpec | None
    findings: tuple[Finding, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem, in the order of the request's fields."""
        return tuple(finding.problem for finding in self.findings)

    def unwrap(self) -> tuple[ResolvedRequest, ModelSpec]:
        """The resolved request and its spec. Raises the error that the findings come to."""
        if self.request is not None and self.spec is not None and not self.findings:
            return self.request, self.spec
        raise failure(self.findings)


def resolve(request: GenerateRequest, catalog: Catalog, *, door: Door) -> Resolution:
    """Check a request against its model's spec and fill in every option, and every input that is a number.

    The config is the model's defaults, then the presets' (base, task, model), then what the request says. A null
    seed is drawn here, so that the report can name it.
    """
    try:
        spec = catalog.find(request.model)
    except ModelNotFound as error:
        return Resolution(None, None, (Finding(Problem(loc="model", rule="known", message=str(error)), error),))
    findings = list(_check_place(request, spec, door))
    task = spec.tasks.get(request.task)
    if task is None:
        told = f"{spec.id} does not do {request.task}; it does {', '.join(spec.tasks)}."
        findings.append(Finding(Problem(loc="task", rule="choice", message=told)))
        return Resolution(None, spec, tuple(findings))
    findings += [Finding(problem) for problem in _check_inputs(request, task)]
    config, problems = _resolve_config(request, task)
    findings += [Finding(problem) for problem in problems]
    if findings:
        return Resolution(None, spec, tuple(findings))
    resolved = ResolvedRequest(
        task=request.task,
        model=spec.id,
        backend=request.backend,
        inputs=Inputs.model_validate(_resolve_inputs(request.inputs, task)),
        config=config,
        priority=request.priority,
        tags=tuple(sorted(set(request.tags))),
        metadata=request.metadata,
        deadline_s=request.deadline_s,
    )
    return Resolution(resolved, spec)


def _check_place(request: GenerateRequest, spec: ModelSpec, door: Door) -> Iterable[Finding]:
    if spec.tier in door.disabled_tiers:
        tier = ModelTierDisabled(
            f"Models of the tier {spec.tier} are switched off here, {spec.id} among them.",
            "Ask the operator, or use another model.",
        )
        yield Finding(Problem(loc="model", rule="tier", message=str(tier)), tier)
    stub_only = set(spec.backends) == {Backend.CPU_STUB}
    if not door.allow_stub and (request.backend == Backend.CPU_STUB or stub_only):
        closed = StubDisabled(
            "The backend cpu-stub is closed here.",
            "Use another model; the operator opens it with OMNIRT_ALLOW_STUB=true.",
        )
        yield Finding(Problem(loc="backend", rule="allowed", message=str(closed)), closed)
    if request.backend != AUTO and request.backend not in spec.backends:
        unsupported = BackendUnsupported(
            f"{spec.id} does not run on the backend {request.backend}.",
            f"Use auto or one of {', '.join(spec.backends)}.",
        )
        yield Finding(Problem(loc="backend", rule="supported", message=str(unsupported)), unsupported)


def _check_inputs(request: GenerateRequest, task: TaskSpec) -> Iterable[Problem]:
    inputs = request.inputs
    allowed = (*task.required_inputs, *task.optional_inputs)
    for name in task.required_inputs:
        if inputs.get(name) is None:
            needed = f"It is missing; this task needs {listed(task.required_inputs)}."
            yield Problem(loc=f"inputs.{name}", rule="required", message=needed)
    for name, value in inputs.items():
        if name not in allowed:
            yield unknown_field("inputs", name, allowed)
        elif name == PROMPT and isinstance(value, list):
            yield from check_prompts(value, request.task)
        elif value is not None and (told := _input_problem(name, value, task)):
            rule, message = told
            yield Problem(loc=f"inputs.{name}", rule=rule, message=message)


def _input_problem(name: str, value: object, task: TaskSpec) -> tuple[str, str] | None:
    if name in TEXTS:
        return text_problem(value, required=name in task.required_inputs)
    if name in MEDIA_INPUTS:
        return _reference_problem(value)
    return _number_problem(task.numbers[name], value)


def _resolve_inputs(inputs: Mapping[str, object], task: TaskSpec) -> dict[str, object]:
    defaults = {name: number.default for name, number in task.numbers.items()}
    return defaults | {name: value for name, value in inputs.items() if value is not None}


def _reference_problem(value: object) -> tuple[str, str] | None:
    forms = "send a data URL, upload:ID or artifact:JOB/NAME"
    if not isinstance(value, str):
        return "type", f"{shown(value)} is no reference; {forms}."
    if DATA_URL.match(value) or _REFERENCE.fullmatch(value):
        return None
    if re.match(r"\s*[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        return "remote_url", f"Remote addresses are not fetched; {forms}."
    return "reference", f"It names nothing that this server keeps; {forms}."


def _resolve_config(request: GenerateRequest, task: TaskSpec) -> tuple[dict[str, JsonValue], list[Problem]]:
    problems: list[Problem] = []
    explicit: dict[str, JsonValue] = {}
    for name, value in request.config.items():
        option = task.options.get(name)
        if option is None:
            problems.append(unknown_field("config", name, tuple(task.options)))
        elif told := _option_problem(option, value):
            rule, message = told
            problems.append(Problem(loc=f"config.{name}", rule=rule, message=message))
        else:
            explicit[name] = _plain(option, value)
    preset = explicit.get("preset", presets.DEFAULT_PRESET)
    layers: list[Mapping[str, JsonValue]] = [
        {name: option.default for name, option in task.options.items()},
        presets.BASE.get(str(preset), {}),
        presets.BY_TASK.get(request.task, {}).get(str(preset), {}),
        task.presets.get(str(preset), {}),
        explicit,
    ]
    config = {name: value for layer in layers for name, value in layer.items() if name in task.options}
    prompts = count_prompts(request.inputs.get(PROMPT), request.task)
    if not problems:
        problems += check_pictures(prompts, task.options.get(COUNT_OPTION), config)
    if not problems and "seed" in config:
        problems += _settle_seed(config, prompts)
    if not problems and "strength" in config:
        problems += _check_strength(config)
    return config, problems


def _settle_seed(config: dict[str, JsonValue], prompts: int) -> Iterable[Problem]:
    seed, each = config["seed"], config.get(COUNT_OPTION, 1)
    if seed is None:
        config["seed"] = secrets.randbelow(DRAWN_SEED_MAX + 1)
    elif isinstance(seed, int) and isinstance(each, int) and seed > SEED_MAX - (count := prompts * each) + 1:
        told = f"{seed} leaves no seed for the last of {count} pictures; use at most {SEED_MAX - count + 1}."
        yield Problem(loc="config.seed", rule="maximum", message=told)


def _check_strength(config: Mapping[str, JsonValue]) -> Iterable[Problem]:
    """The last of the steps are run, as large a part of them as the strength says: at least one."""
    strength, steps = config["strength"], config.get("num_inference_steps")
    if isinstance(strength, int | float) and isinstance(steps, int) and int(steps * strength) < 1:
        least = math.ceil(1000 / steps) / 1000
        told = f"{strength} leaves none of {steps} steps to run; use at least {least}, or more steps."
        yield Problem(loc="config.strength", rule="minimum", message=told)


def _option_problem(option: Option, value: object) -> tuple[str, str] | None:
    if value is None:
        if option.nullable:
            return None
        return "type", "null is not accepted; leave it out for its default."
    if option.kind in {OptionKind.INTEGER, OptionKind.NUMBER}:
        return _number_problem(option, value)
    if option.kind is OptionKind.BOOLEAN:
        return None if isinstance(value, bool) else ("type", f"{shown(value)} is neither true nor false.")
    if not isinstance(value, str):
        return "type", f"{shown(value)} is no text; send a string."
    if option.choices is not None and value not in option.choices:
        nearest = difflib.get_close_matches(value, option.choices, n=1)
        meant = f" Did you mean {nearest[0]}?" if nearest else ""
        return "choice", f"{shown(value)} is not one of {', '.join(option.choices)}.{meant}"
    return None


def _number_problem(option: Option, value: object) -> tuple[str, str] | None:
    whole = option.kind is OptionKind.INTEGER
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "type", f"{shown(value)} is no number; send {'a whole number' if whole else 'a number'}."
    bounds = _bounds(option)
    if isinstance(value, float) and not math.isfinite(value):
        return "finite", f"{value} is out of bounds; use {bounds}."
    if whole and not isinstance(value, int):
        return "type", f"{value} is no whole number; use {bounds}."
    if option.minimum is not None and value < option.minimum:
        random = "; null draws a random one" if option.name == "seed" else ""
        return "minimum", f"{shown(value)} is below {option.minimum}; use {bounds}{random}."
    if option.maximum is not None and value > option.maximum:
        return "maximum", f"{shown(value)} is above {option.maximum}; use {bounds}."
    if option.multiple_of is not None and (above := (value - option.remainder) % option.multiple_of):
        lower = int(value - above)
        near = [
            allowed
            for allowed in (lower, lower + option.multiple_of)
            if (option.minimum is None or allowed >= option.minimum)
            and (option.maximum is None or allowed <= option.maximum)
        ]
        wanted = f"{option.remainder} more than a" if option.remainder else "a"
        told = f"{value} is not {wanted} multiple of {option.multiple_of}; use {' or '.join(map(str, near))}."
        return "multiple_of", told
    return None


def _bounds(option: Option) -> str:
    if option.minimum is not None and option.maximum is not None:
        if option.minimum == option.maximum:
            return f"{option.minimum}"
        return f"{option.minimum} to {option.maximum}"
    return f"at least {option.minimum}" if option.minimum is not None else "a finite number"


def _plain(option: Option, value: object) -> JsonValue:
    if option.kind is OptionKind.NUMBER and isinstance(value, int):
        return float(value)
    # Checked above against the option's kind, so it is one of these.
    return value if isinstance(value, str | int | float) else None
