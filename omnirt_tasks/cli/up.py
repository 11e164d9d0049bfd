"""`omnirt up`: broker, worker and gateway in the foreground, with merged, labelled logs."""

import os
import threading
from collections.abc import Callable

import click

from omnirt_tasks.cli.roles import queues_option
from omnirt_tasks.embedded import free_port, port_is_free
from omnirt_tasks.settings import load_settings
from omnirt_tasks.system import System

_COLOURS = {"broker": "magenta", "worker": "cyan", "gateway": "green"}
BROKER_FOLDER = "broker"
WORKER_MARGIN_S = 10.0  # beyond the grace of its jobs, for it to give them back


def labelled_echo() -> Callable[[str, str], None]:
    """What prints (child's name, line) whole, from any thread; coloured on a terminal."""
    lock = threading.Lock()

    def echo(name: str, line: str) -> None:
        label = click.style(f"[{name}]".ljust(10), fg=_COLOURS.get(name))
        with lock:
            click.echo(f"{label} {line}")

    return echo


@click.command()
@queues_option
@click.option("--port", type=click.IntRange(0, 65535), help="The gateway's port.  [OMNIRT_PORT, 8000 or a free one]")
@click.option(
    "--keep/--no-keep", default=True, show_default=True, help="Keep jobs below OMNIRT_DATA_DIR for the next start."
)
def up(queues: tuple[str, ...], port: int | None, keep: bool) -> None:
    """Run the whole system here until Ctrl-C: broker, one worker and the gateway.

    With OMNIRT_REDIS_URL set, that Redis is used in place of the embedded broker.
    """
    settings = load_settings()
    if port is None and "port" not in settings.model_fields_set and not port_is_free(settings.host, settings.port):
        port = free_port()
    system = System(
        queues=queues,
        host=settings.host,
        port=settings.port if port is None else port,
        worker_grace_s=settings.grace_s + WORKER_MARGIN_S,
        log_level=settings.log_level,
        environment=os.environ,
        embedded_broker="redis_url" not in settings.model_fields_set,
        broker_dir=settings.data_dir.expanduser() / BROKER_FOLDER if keep else None,
        broker_fsync=settings.broker_fsync,
        on_line=labelled_echo(),
    )
    try:
        with system:
            click.secho(f"\nReady: {system.url}   (to try it: {system.url}/docs; Ctrl-C stops everything)\n", bold=True)
            system.wait()
    except (KeyboardInterrupt, SystemExit):
        click.echo("Stopped.")  # how it is meant to end
