"""The `omnirt` command: one module per command, each a thin door to the library."""

import signal
import sys
from types import FrameType

import click

import omnirt_tasks
from omnirt_tasks.cli.bench import bench
from omnirt_tasks.cli.calibrate import calibrate
from omnirt_tasks.cli.demo import demo
from omnirt_tasks.cli.exits import ReportingGroup
from omnirt_tasks.cli.generate import generate, validate
from omnirt_tasks.cli.jobs import jobs
from omnirt_tasks.cli.models import models
from omnirt_tasks.cli.roles import broker, serve, worker
from omnirt_tasks.cli.up import up

EPILOG = """\b
Exit codes:
  0    done
  1    the installation fails: a setting, a child process, the storage
  2    wrong usage, or a request that is refused
  3    the job failed
  4    the job was cancelled
  5    it is not over in time (--timeout); the job goes on
  6    no gateway answers, it refuses the key, or takes nothing now
  130  interrupted

Settings come from OMNIRT_… variables and the file that OMNIRT_CONFIG names. Results go to standard output, progress
and errors to standard error; with --json, standard output is one JSON document.
"""


@click.group(cls=ReportingGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(omnirt_tasks.__version__, prog_name="omnirt")
def cli() -> None:
    """Image, video and speech generation as solid jobs."""


for command in (generate, validate, models, jobs, serve, worker, broker, up, demo, calibrate, bench):
    cli.add_command(command)


def main() -> None:
    """Run the command. SIGTERM and SIGHUP end it in order, as Ctrl-C does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with it ignored
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    cli(prog_name="omnirt")


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
