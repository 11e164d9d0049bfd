"""`omnirt jobs`: what a gateway's jobs are doing."""

import itertools
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omnirt_tasks.cli.exits import Exit, as_document, exit_code
from omnirt_tasks.cli.generate import finish, timeout_option
from omnirt_tasks.cli.options import client_of, json_option, url_option
from omnirt_tasks.cli.outputs import downloads
from omnirt_tasks.cli.progress import JobProgress
from omnirt_tasks.contract import CancelOutcome, JobRecord, JobState
from omnirt_tasks.errors import OmnirtError

Told = TypeVar("Told")

_COLOURS = {
    JobState.QUEUED: "yellow",
    JobState.RUNNING: "cyan",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "magenta",
}
_OUTCOMES = {
    CancelOutcome.CANCELLED: "cancelled",
    CancelOutcome.REQUESTED: "asked to stop; it ends at its next step",
    CancelOutcome.ALREADY_FINISHED: "already over; nothing changed",
}


@click.group()
def jobs() -> None:
    """List, show, watch, cancel, retry and drop the jobs of a gateway."""


@jobs.command("list")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--model", metavar="ID", help="Only jobs of this model.")
@click.option(
    "--dead", is_flag=True, help="Only dead letters: jobs that failed because whatever ran them died, again and again."
)
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="The newest so many.")
@url_option
@json_option
def list_jobs(state: str | None, model: str | None, dead: bool, limit: int, url: str | None, as_json: bool) -> None:
    """List jobs, newest first."""
    with client_of(url) as client:
        wanted = None if state is None else JobState(state)
        found = list(itertools.islice(client.jobs(state=wanted, model=model, dead_letters=dead), limit))
    if as_json:
        click.echo(json.dumps([job.model_dump(mode="json") for job in found]))
        return
    # Narrow, so that a terminal of 80 columns holds it.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for title in ("job", *(("queued", "model", "why") if dead else ("state", "progress", "queued", "model"))):
        table.add_column(title, no_wrap=title not in {"model", "why"}, overflow="fold")  # an id is whole, to be copied
    for job in found:
        model, queued = escape(str(job.request.get("model"))), _time(job.enqueued_at_ms)
        if dead:
            table.add_row(job.id, queued, model, escape(job.error.message) if job.error else "")
        else:
            table.add_row(job.id, f"[{_COLOURS[job.state]}]{job.state}", _progress(job), queued, model)
    Console().print(table)


@jobs.command()
@click.argument("job_id")
@url_option
@json_option
def show(job_id: str, url: str | None, as_json: bool) -> None:
    """Show one job: its state, priority and place in line, when it may be done, its parts if it was split, its result.

    Times are seconds from now (`eta_s` in half of all cases, `eta_p90_s` in nine of ten) and Unix milliseconds.
    """
    with client_of(url) as client:
        job = client.job(job_id)
    if as_json:
        click.echo(job.model_dump_json())
    else:
        Console().print_json(job.model_dump_json(exclude_none=True))


@jobs.command()
@click.argument("job_id")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Save the outputs there, once it has succeeded.")
@timeout_option
@url_option
@json_option
def watch(job_id: str, output: Path | None, timeout_s: float | None, url: str | None, as_json: bool) -> None:
    """Follow a job to its end. Ctrl-C stops watching; the job goes on."""
    with client_of(url) as client:
        with JobProgress() as progress:
            for event in client.events(job_id, timeout_s=timeout_s):
                progress.show(event)
        finish(client.job(job_id), output, downloads(client), as_json=as_json)


@jobs.command()
@click.argument("job_ids", nargs=-1, required=True)
@url_option
@json_option
def cancel(job_ids: tuple[str, ...], url: str | None, as_json: bool) -> None:
    """Cancel jobs: queued ones at once, running ones at their next step."""
    with client_of(url) as client:
        _each(job_ids, client.cancel, lambda outcome: _OUTCOMES[outcome], as_json=as_json)


@jobs.command()
@click.argument("job_ids", nargs=-1, required=True)
@url_option
@json_option
def retry(job_ids: tuple[str, ...], url: str | None, as_json: bool) -> None:
    """Submit failed or cancelled jobs anew, with the same request and seed; dead letters are none any more."""
    with client_of(url) as client:
        _each(job_ids, lambda job_id: client.retry(job_id).id, lambda new_id: f"again as {new_id}", as_json=as_json)


@jobs.command()
@click.argument("job_ids", nargs=-1, required=True)
@url_option
@json_option
def drop(job_ids: tuple[str, ...], url: str | None, as_json: bool) -> None:
    """Remove jobs with all that is kept of them; those that are not over are cancelled."""

    def purge(job_id: str) -> str:
        client.purge(job_id)
        return "dropped"

    with client_of(url) as client:
        _each(job_ids, purge, str, as_json=as_json)


def _each(job_ids: Sequence[str], act: Callable[[str], Told], words: Callable[[Told], str], *, as_json: bool) -> None:
    """Do it to each job and tell what came of it; one that is refused keeps it from none of the others.

    As JSON it is an object with an entry for each job, a refused one's in the form of an error.
    """
    told: dict[str, object] = {}
    refused = False
    for job_id in job_ids:
        try:
            done = act(job_id)
        except OmnirtError as error:
            if exit_code(error) is not Exit.REFUSED:
                raise
            refused = True
            told[job_id] = as_document(error)
            click.echo(f"{job_id}: {click.style(error.code, fg='red')}: {error}", err=True)
        else:
            told[job_id] = done
            if not as_json:
                click.echo(f"{job_id}: {words(done)}")
    if as_json:
        click.echo(json.dumps(told))
    if refused:
        raise click.exceptions.Exit(Exit.REFUSED)


def _progress(job: JobRecord) -> str:
    if job.progress is not None:
        return f"{job.progress.step}/{job.progress.total}"
    if job.queue is None or job.queue.position is None:
        return ""
    place = f"#{job.queue.position}"
    return place if job.queue.eta_s is None else f"{place} {_duration(job.queue.eta_s)}"


def _duration(duration_s: float) -> str:
    """About how long, as people say it."""
    if duration_s < 100:
        return f"~{duration_s:.0f} s"
    return f"~{duration_s / 60:.0f} min" if duration_s < 6_000 else f"~{duration_s / 3600:.0f} h"


def _time(at_ms: int) -> str:
    at = datetime.fromtimestamp(at_ms / 1000).astimezone()
    return at.strftime("%H:%M:%S" if at.date() == datetime.now().astimezone().date() else "%Y-%m-%d")
