"""`omnirt serve`, `worker` and `broker`: one part of the system each, in the foreground."""

import os
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.errors import ConfigurationError, OperatorError
from omnirt_tasks.routing import parse_queue
from omnirt_tasks.settings import load_settings
from omnirt_tasks.system import worker_command

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


@click.command(context_settings={"ignore_unknown_options": True})
@queues_option
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
def worker(queues: tuple[str, ...], celery_arguments: tuple[str, ...]) -> None:
    """Run a worker on the next free device: `celery -A omnirt_tasks worker -Q …`, with CELERY_ARGUMENTS added."""
    command = [*worker_command(queues, load_settings().log_level), *celery_arguments]
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted: this process becomes the worker


@click.command()
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Keep the data there; else they go with it."
)
def broker(data_dir: Path | None) -> None:
    """Run the embedded broker (Valkey) where OMNIRT_REDIS_URL says: its port and password, on 127.0.0.1."""
    url = urlsplit(load_settings().celery_url)
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
        on_line=click.echo,
        on_exit=lambda _: ended.set(),
    ):
        ended.wait()
        raise OperatorError("The broker ended unexpectedly; its last lines are above.")
