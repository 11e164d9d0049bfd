"""`omnirt serve`, `worker` and `broker`: one part of the system each, in the foreground."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
from rich import box
from rich.console import Console
from rich.table import Table

from omnirt_tasks.celery_app import make_app
from omnirt_tasks.cli.options import json_option
from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.draining import Drainer
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.errors import ConfigurationError, OperatorError
from omnirt_tasks.routing import parse_queue
from omnirt_tasks.settings import load_settings
from omnirt_tasks.stores import open_stores
from omnirt_tasks.system import worker_command

RUN = "run"
DEFAULT_QUEUES = "cpu-shapes"
REDIS_PORT = 6379


def _queues(_ctx: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise click.BadParameter("name at least one queue, such as cpu-shapes")
    for name in names:
        try:
            parse_queue(name)
        except ConfigurationError as error:
            raise click.BadParameter(str(error)) from error
    return names


queues_option = click.option(
    "-Q",
    "--queues",
    default=DEFAULT_QUEUES,
    show_default=True,
    callback=_queues,
    metavar="NAMES",
    help="The queues to serve, {backend}-{queue}, separated by commas.",
)


@click.command()
@click.option("--host", help="The address to listen on.  [OMNIRT_HOST, 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on.  [OMNIRT_PORT, 8000]")
def serve(host: str | None, port: int | None) -> None:
    """Run the gateway."""
    from web.server import serve as run

    given = {"host": host, "port": port}
    run(load_settings(**{name: value for name, value in given.items() if value is not None}))


class WorkerGroup(click.Group):
    """`omnirt worker`, which runs a worker when no command of the group is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before what names neither a command nor asks for help."""
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else [RUN, *args])


@click.group(cls=WorkerGroup)
def worker() -> None:
    """Run a worker, list those that live, or drain one: `omnirt worker -Q …` is short for `omnirt worker run -Q …`."""


@worker.command(RUN, context_settings={"ignore_unknown_options": True})
@queues_option
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
def run_worker(queues: tuple[str, ...], celery_arguments: tuple[str, ...]) -> None:
    """Run a worker on the next free device: `celery -A omnirt_tasks worker -Q …`, with CELERY_ARGUMENTS added."""
    command = [*worker_command(queues, load_settings().log_level), *celery_arguments]
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted: this process becomes the worker


@worker.command("list")
@json_option
def list_workers(as_json: bool) -> None:
    """List the live workers: what each serves and has in hand, and how many rows of its models share a device call."""
    with closing(open_stores(load_settings())) as stores:
        found = stores.fleet.live()
    if as_json:
        click.echo(json.dumps([record.model_dump(mode="json") for record in found]))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("worker", "queues", "jobs", "loaded", "shared calls"):
        table.add_column(column)
    for record in found:
        jobs = f"{record.running} of {record.concurrency}"
        table.add_row(
            record.worker_id, ", ".join(record.queues), jobs, ", ".join(record.loaded), "\n".join(_shared(record))
        )
    Console().print(table)


def _shared(record: WorkerCapability) -> Iterator[str]:
    for model, ability in record.abilities.items():
        if ability.unchunked is not None:
            yield f"{model}: none, {ability.unchunked}"
        for measure in ability.chunks:
            yield f"{model} {measure.module} {measure.shape}: {measure.limit} rows, {measure.gain:.2f}x"


@worker.command("drain")
@click.argument("name")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long its jobs may take to finish.  [the worker's own OMNIRT_GRACE_S]",
)
def drain_worker(name: str, grace_s: float | None) -> None:
    """Have the worker NAME (cpu-0@host, or cpu-0 where that is plain) take no more jobs, and end.

    Its jobs may finish within the grace time; the others go back to their queue. Waits until it is gone.
    """
    settings = load_settings()
    shown: list[int] = []

    def show(node: str, jobs: int) -> None:
        if not shown or shown[-1] != jobs:
            click.echo(f"{node}: {jobs} job{'' if jobs == 1 else 's'} in hand", err=True)
            shown.append(jobs)

    with closing(open_stores(settings)) as stores, make_app(settings) as app:
        Drainer(app, stores.fleet).drain(name, grace_s=grace_s, on_progress=show)
    click.echo(f"The worker {name} is gone.", err=True)


@click.command()
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Keep the data there; else they go with it."
)
def broker(data_dir: Path | None) -> None:
    """Run the embedded broker (Valkey) where OMNIRT_REDIS_URL says: its port and password, on 127.0.0.1."""
    settings = load_settings()
    url = urlsplit(settings.celery_url)
    if url.scheme != "redis" or url.hostname not in {"127.0.0.1", "localhost"}:
        raise ConfigurationError(
            "The embedded broker serves redis://127.0.0.1 alone, and OMNIRT_REDIS_URL names another place.",
            "Unset it, or use the Redis that it names.",
        )
    ended = threading.Event()
    with EmbeddedBroker(
        data_dir=data_dir,
        port=url.port or REDIS_PORT,
        password=unquote(url.password or ""),
        fsync=settings.broker_fsync,
        on_line=click.echo,
        on_exit=lambda _: ended.set(),
    ):
        ended.wait()
        raise OperatorError("The broker ended unexpectedly; its last lines are above.")
