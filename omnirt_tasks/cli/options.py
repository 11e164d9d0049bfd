"""Options that several commands share."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from omnirt_tasks.cli.exits import JSON_WANTED
from omnirt_tasks.client import Client
from omnirt_tasks.contract import AUTO, Backend, GenerateRequest, Priority, Task
from omnirt_tasks.settings import Settings, load_settings

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _want_json(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> bool:
    ctx.meta[JSON_WANTED] = wanted
    return wanted


def json_option(command: Decorated) -> Decorated:
    """`--json` as the argument `as_json`; errors become a JSON document too."""
    return click.option(
        "--json", "as_json", is_flag=True, callback=_want_json, help="Print one JSON document to standard output."
    )(command)


def url_option(command: Decorated) -> Decorated:
    """`--url` of the gateway; the environment and the settings file may give it instead."""
    return click.option("--url", metavar="URL", help="The gateway.  [OMNIRT_URL]")(command)


def client_for(url: str | None, settings: Settings) -> Client:
    """A client of the gateway at `url`, else the settings' one, else the one on this host."""
    chosen = url or settings.url or f"http://127.0.0.1:{settings.port}"
    return Client(chosen, settings.api_key.get_secret_value() if settings.api_key else None)


def client_of(url: str | None) -> Client:
    """The same, with the settings of this process."""
    return client_for(url, load_settings())


def _config_entry(_ctx: click.Context, _parameter: click.Parameter, entries: tuple[str, ...]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{entry!r} is not KEY=VALUE")
        try:
            config[name] = json.loads(value)
        except json.JSONDecodeError:
            config[name] = value  # text needs no quotes
    return config


_REQUEST_OPTIONS = (
    click.option("--model", required=True, metavar="ID", help="A model's id or alias (see: omnirt models)."),
    click.option(
        "--task", type=click.Choice([task.value for task in Task]), help="By default what the inputs suggest."
    ),
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="What is wanted, in words; repeatable, for pictures of each.",
    ),
    click.option("--negative-prompt", metavar="TEXT", help="What is not wanted."),
    click.option("--image", metavar="FILE", help="A picture: a file, a data URL, upload:ID or artifact:JOB/NAME."),
    click.option("--mask", metavar="FILE", help="The part to make anew, white on black."),
    click.option("--audio", metavar="FILE", help="A recording."),
    click.option("--preset", metavar="NAME", help="fast, balanced, quality or low-vram."),
    click.option("--seed", type=int, help="The picture's number; random by default, and told."),
    click.option("--steps", type=int, help="Denoising steps (num_inference_steps)."),
    click.option("-n", "--count", type=int, help="Pictures of each prompt (num_images_per_prompt)."),
    click.option(
        "--set",
        "config",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_config_entry,
        help="Any option of the model; repeatable. VALUE is read as JSON, else as text.",
    ),
    click.option(
        "--backend",
        type=click.Choice([AUTO, *(backend.value for backend in Backend)]),
        default=AUTO,
        show_default=True,
    ),
    click.option(
        "--priority",
        type=click.Choice([priority.value for priority in Priority]),
        default=Priority.NORMAL.value,
        show_default=True,
        help="Which jobs go first.",
    ),
    click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag that the worker must have; repeatable."),
    click.option(
        "--deadline",
        "deadline_s",
        type=float,
        metavar="SECONDS",
        help="End the job with `timeout` if it is not over so long after it was accepted.",
    ),
)


def request_options(command: Decorated) -> Decorated:
    """The options that make a request; the command hands them on to `request_from`."""
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return command


def request_from(
    *,
    model: str,
    task: str | None,
    prompts: tuple[str, ...],
    negative_prompt: str | None,
    image: str | None,
    mask: str | None,
    audio: str | None,
    preset: str | None,
    seed: int | None,
    steps: int | None,
    count: int | None,
    config: dict[str, Any],
    backend: str,
    priority: str,
    tags: tuple[str, ...],
    deadline_s: float | None,
) -> GenerateRequest:
    """The request that the options say. Raises ValidationFailed for one that has not even the right shape."""
    from omnirt_tasks.registry.options import COUNT_OPTION
    from omnirt_tasks.validation import parse_request

    inputs = {
        "prompt": list(prompts) if len(prompts) > 1 else next(iter(prompts), None),
        "negative_prompt": negative_prompt,
        "image": image,
        "mask": mask,
        "audio": audio,
    }
    named = {"preset": preset, "seed": seed, "num_inference_steps": steps, COUNT_OPTION: count}
    return parse_request(
        {
            "task": task or _suggested(image=image, mask=mask, audio=audio),
            "model": model,
            "backend": backend,
            "inputs": {name: value for name, value in inputs.items() if value is not None},
            "config": config | {name: value for name, value in named.items() if value is not None},
            "priority": priority,
            "tags": list(tags),
            "deadline_s": deadline_s,
        }
    )


def _suggested(*, image: str | None, mask: str | None, audio: str | None) -> Task:
    if mask is not None:
        return Task.INPAINT
    if audio is not None:
        return Task.AUDIO2VIDEO if image is not None else Task.AUDIO2TEXT
    return Task.TEXT2IMAGE if image is None else Task.IMAGE2IMAGE
