"""How a command ends: exit codes for scripts, and errors as one line."""

import json
from enum import IntEnum
from typing import Any

import click

from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import (
    CallerError,
    GatewayUnreachable,
    JobCancelled,
    JobError,
    JobTimeout,
    OmnirtError,
    StoreUnavailable,
    Unauthorized,
)

JSON_WANTED = "omnirt_tasks.cli.json"


class Exit(IntEnum):
    """The exit codes that `omnirt --help` lists."""

    INSTALLATION = 1
    REFUSED = 2
    FAILED = 3
    CANCELLED = 4
    TIMEOUT = 5
    UNREACHABLE = 6
    INTERRUPTED = 130


# The first kind that fits decides.
_EXITS: tuple[tuple[type[OmnirtError], Exit], ...] = (
    (GatewayUnreachable, Exit.UNREACHABLE),
    (StoreUnavailable, Exit.UNREACHABLE),
    (Unauthorized, Exit.UNREACHABLE),
    (JobCancelled, Exit.CANCELLED),
    (JobTimeout, Exit.TIMEOUT),
    (JobError, Exit.FAILED),
)


def exit_code(error: OmnirtError) -> Exit:
    """The exit code of a command that ends with this error."""
    for kind, code in _EXITS:
        if isinstance(error, kind):
            return code
    if isinstance(error, CallerError):
        return Exit.UNREACHABLE if error.retryable else Exit.REFUSED  # a full queue takes nothing now
    return Exit.INSTALLATION


class ReportingGroup(click.Group):
    """A group whose commands tell of an error in one line on standard error, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn what ends it into an exit code."""
        try:
            return super().invoke(ctx)
        except OmnirtError as error:
            tell(error, as_json=ctx.meta.get(JSON_WANTED, False))
            ctx.exit(exit_code(error))
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(Exit.INTERRUPTED)


def tell(error: OmnirtError, *, as_json: bool) -> None:
    """Write the error: its code and what it says, and each problem on a line of its own."""
    click.echo(f"{click.style(error.code, fg='red')}: {error}", err=True)
    if len(error.details) > 1:
        for problem in error.details:
            click.echo(f"  {problem.loc}: {problem.message}", err=True)
    if as_json:
        click.echo(json.dumps(as_document(error)))


def as_document(error: OmnirtError) -> JsonObject:
    """The error as what `--json` prints."""
    return {
        "error": {
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
            "details": [problem.model_dump(mode="json") for problem in error.details],
        }
    }
