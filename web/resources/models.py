"""The models that are registered, and what each allows."""

from typing import Literal

from flask import Blueprint, Response
from pydantic import JsonValue

from omnirt_tasks.contract import Backend, Task, Tier
from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import ModelNotFound, ValidationFailed
from omnirt_tasks.registry import ModelSpec, Option, TaskSpec
from omnirt_tasks.validation.texts import PROMPT, PROMPT_CHARS_MAX, PROMPTS_MAX, takes_prompts
from web.answers import json_answer
from web.operations import Parameter, documented
from web.queries import Query
from web.services import services

LIST_PARAMETERS = (
    Parameter("task", "Only models of this task.", {"type": "string", "enum": list(Task)}),
    Parameter("tier", "Only models of this tier.", {"type": "string", "enum": list(Tier)}),
)

blueprint = Blueprint("models", __name__)


class Model(Answer):
    """A model; `limits` is {task: {field: its type, bounds, choices and default}}, of options and inputs alike.

    Of the inputs they tell the numbers, and the prompt: of `max_length` characters, and where it may be a list, of
    `max_items` of them.
    """

    id: str
    object: Literal["model"] = "model"
    owned_by: str
    task: Task
    tasks: tuple[Task, ...]
    tier: str
    status: str
    backends: tuple[Backend, ...]
    limits: dict[str, dict[str, dict[str, JsonValue]]]
    summary: str
    aliases: tuple[str, ...]


class ModelList(Answer):
    """Every model that matches, by id."""

    object: Literal["list"] = "list"
    data: tuple[Model, ...]


@blueprint.get("/v1/models")
@documented("List models", {200: ModelList}, errors=(ValidationFailed,), parameters=LIST_PARAMETERS)
def list_models() -> Response:
    """One entry per id."""
    query = Query(LIST_PARAMETERS)
    task, tier = query.choice("task", Task), query.choice("tier", Tier)
    query.check()
    return json_answer(ModelList(data=tuple(map(_shown, services().catalog.having(task=task, tier=tier)))))


@blueprint.get("/v1/models/<model_id>")
@documented("A model, by id or alias", {200: Model}, errors=(ModelNotFound,))
def show_model(model_id: str) -> Response:
    """The model itself, whichever of its names was asked for."""
    return json_answer(_shown(services().catalog.find(model_id)))


def _shown(spec: ModelSpec) -> Model:
    tasks = tuple(spec.tasks)
    return Model(
        id=spec.id,
        owned_by=spec.owned_by,
        task=tasks[0],
        tasks=tasks,
        tier=spec.tier,
        status=spec.status,
        backends=spec.backends,
        limits={
            str(task): _prompt(task, its)
            | {name: _limits(option) for name, option in {**its.options, **its.numbers}.items()}
            for task, its in spec.tasks.items()
        },
        summary=spec.summary,
        aliases=spec.aliases,
    )


def _prompt(task: Task, its: TaskSpec) -> dict[str, dict[str, JsonValue]]:
    """What is told of the prompt, where the task takes one."""
    if PROMPT not in {*its.required_inputs, *its.optional_inputs}:
        return {}
    told: dict[str, JsonValue] = {
        "type": "string",
        "default": None,
        "summary": "What is wanted, in words.",
        "max_length": PROMPT_CHARS_MAX,
    }
    if takes_prompts(task):
        told |= {"summary": "What is wanted, in words; or a list, for pictures of each.", "max_items": PROMPTS_MAX}
    return {PROMPT: told}


def _limits(option: Option) -> dict[str, JsonValue]:
    told: dict[str, JsonValue] = {"type": str(option.kind), "default": option.default, "summary": option.summary}
    bounds: dict[str, JsonValue] = {
        "min": option.minimum,
        "max": option.maximum,
        "multiple_of": option.multiple_of,
        "remainder": option.remainder or None,
        "choices": [*option.choices] if option.choices is not None else None,
        "nullable": option.nullable or None,
        "unit": option.unit or None,
    }
    return told | {name: value for name, value in bounds.items() if value is not None}
