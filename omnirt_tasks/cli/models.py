"""`omnirt models`: what can be run, here or at a gateway."""

import json

import click
from rich import box
from rich.console import Console
from rich.table import Table

from omnirt_tasks.cli.options import client_for, json_option, url_option
from omnirt_tasks.contract import Task, Tier
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.settings import load_settings


@click.command()
@click.option("--task", type=click.Choice([task.value for task in Task]), help="Only models that do this.")
@click.option("--tier", type=click.Choice([tier.value for tier in Tier]), help="Only models of this tier.")
@click.option("--markdown", "as_markdown", is_flag=True, help="This installation's, as docs/models.md shows them.")
@url_option
@json_option
def models(task: str | None, tier: str | None, as_markdown: bool, url: str | None, as_json: bool) -> None:
    """List the models: those of this installation, or of a gateway (--url, OMNIRT_URL)."""
    if as_markdown:
        _print_markdown()
        return
    settings = load_settings()
    wanted = None if task is None else Task(task)
    of_tier = None if tier is None else Tier(tier)
    if url is not None or settings.url is not None:
        with client_for(url, settings) as client:
            found = client.models(task=wanted, tier=of_tier)
    else:
        found = _local_models(wanted, of_tier)
    if as_json:
        click.echo(json.dumps(list(found)))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    table.add_column("tasks", max_width=12)
    table.add_column("backends", max_width=9)
    table.add_column("what it is")
    for model in found:
        table.add_row(str(model["id"]), _listed(model["tasks"]), _listed(model["backends"]), str(model["summary"]))
    Console().print(table)


def _local_models(task: Task | None, tier: Tier | None) -> tuple[JsonObject, ...]:
    from omnirt_tasks.registry import discover

    return tuple(
        {
            "id": spec.id,
            "aliases": list(spec.aliases),
            "tasks": [task.value for task in spec.tasks],
            "backends": [backend.value for backend in spec.backends],
            "tier": spec.tier,
            "status": spec.status,
            "summary": spec.summary,
        }
        for spec in discover().having(task=task, tier=tier)
    )


def _print_markdown() -> None:
    from omnirt_tasks.registry import discover
    from omnirt_tasks.registry.table import markdown

    click.echo(markdown(discover()))


def _listed(value: object) -> str:
    return ", ".join(str(entry) for entry in value) if isinstance(value, list) else str(value)
