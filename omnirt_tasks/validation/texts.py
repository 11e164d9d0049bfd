"""What is wrong with the words of a request, and with how many pictures its prompts come to."""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue

from omnirt_tasks.contract import Problem, Task
from omnirt_tasks.registry.options import COUNT_OPTION, PICTURES_MAX
from omnirt_tasks.registry.spec import Option
from omnirt_tasks.validation.findings import shown

PROMPT_CHARS_MAX = 8_000
PROMPTS_MAX = PICTURES_MAX

PROMPT = "prompt"
TEXTS = (PROMPT, "negative_prompt", "reference_text")
"""The inputs that are texts."""


def text_problem(value: object, *, required: bool) -> tuple[str, str] | None:
    """The rule that an input's text breaks, and the words for it."""
    if isinstance(value, list):
        return "type", "A list is not accepted; send one text, which is for all that the job makes."
    if not isinstance(value, str):
        return "type", f"{shown(value)} is no text; send a string."
    if len(value) > PROMPT_CHARS_MAX:
        return "max_length", f"It has {len(value)} characters; at most {PROMPT_CHARS_MAX} are accepted."
    if required and not value.strip():
        return "min_length", "It is empty; say what is wanted."
    return None


def takes_prompts(task: Task) -> bool:
    """Whether a list of prompts may stand for one."""
    return task is Task.TEXT2IMAGE


def check_prompts(prompts: Sequence[object], task: Task) -> Iterable[Problem]:
    """What is wrong with a list of prompts: with the list, or with its entries, each under its index from 0."""
    loc = f"inputs.{PROMPT}"
    if not takes_prompts(task):
        told = f"A list of prompts is for {Task.TEXT2IMAGE} alone; send one text, and a {task} job for each."
        yield Problem(loc=loc, rule="type", message=told)
    elif not prompts:
        yield Problem(loc=loc, rule="min_length", message="The list is empty; say what is wanted.")
    elif len(prompts) > PROMPTS_MAX:
        told = f"The list has {len(prompts)} prompts; at most {PROMPTS_MAX} are accepted in a job."
        yield Problem(loc=loc, rule="max_length", message=told)
    else:
        for index, prompt in enumerate(prompts):
            wrong = (
                ("type", "A list within the list is not accepted; send a string.")
                if isinstance(prompt, list)
                else text_problem(prompt, required=True)
            )
            if wrong is not None:
                rule, message = wrong
                yield Problem(loc=f"{loc}.{index}", rule=rule, message=message)


def count_prompts(prompt: object, task: Task) -> int:
    """How many prompts an input holds, each with pictures of its own; 1 for what is no list that is accepted."""
    if not isinstance(prompt, list) or not takes_prompts(task):
        return 1
    return len(prompt) if 0 < len(prompt) <= PROMPTS_MAX else 1


def check_pictures(prompts: int, per_prompt: Option | None, config: Mapping[str, JsonValue]) -> Iterable[Problem]:
    """What is wrong with the pictures of a job together: `prompts` times those of each, which `per_prompt` bounds.

    The bound of the option is that of the job. A model without it makes one picture of each prompt.
    """
    each = config.get(COUNT_OPTION, 1)
    limit = PICTURES_MAX if per_prompt is None or per_prompt.maximum is None else int(per_prompt.maximum)
    if not isinstance(each, int) or prompts == 1 or prompts * each <= limit:
        return
    told = f"{prompts} prompts of {each} picture(s) each are {prompts * each} pictures; at most {limit} are accepted."
    loc = f"inputs.{PROMPT}" if prompts > limit else f"config.{COUNT_OPTION}"
    yield Problem(loc=loc, rule="maximum", message=told)
