"""`omnirt generate` and `omnirt validate`: one request, over HTTP or in this process."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click

import omnirt_tasks
from omnirt_tasks.cli.exits import Exit, tell
from omnirt_tasks.cli.options import (
    client_for,
    json_option,
    request_from,
    request_options,
    url_option,
)
from omnirt_tasks.cli.outputs import DEFAULT_FOLDER, Fetch, copy_output, downloads, save_outputs, told_outputs
from omnirt_tasks.cli.progress import JobProgress
from omnirt_tasks.contract import CancelOutcome, Event, GenerateRequest, JobRecord, JobState
from omnirt_tasks.errors import OmnirtError, error_from
from omnirt_tasks.local_files import data_url, with_files
from omnirt_tasks.observability import logs
from omnirt_tasks.results import result_of
from omnirt_tasks.settings import load_settings


class Runner(Protocol):
    """What runs a job: a gateway's Client, or an OmniEngine in this process."""

    def events(self, job_id: str, *, after: int = 0, timeout_s: float | None = None) -> Iterator[Event]:
        """The job's events until it is over. Raises JobTimeout."""
        ...

    def job(self, job_id: str) -> JobRecord:
        """The job as it stands."""
        ...

    def cancel(self, job_id: str) -> CancelOutcome:
        """Cancel the job."""
        ...


Submit = Callable[[GenerateRequest], JobRecord]

output_option = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="A folder, or the file for a single output.",
)
timeout_option = click.option("--timeout", "timeout_s", type=float, metavar="SECONDS", help="Wait this long at most.")


@click.command()
@request_options
@output_option
@timeout_option
@click.option("-v", "--verbose", is_flag=True, help="Show the log of a job that runs in this process.")
@click.option("--no-wait", is_flag=True, help="Only submit, and print the job's id (needs a gateway).")
@click.option(
    "--idempotency-key",
    metavar="TEXT",
    help="A name of yours for this job: the same command again follows it, and makes no other (needs a gateway).",
)
@url_option
@json_option
def generate(
    output: Path,
    timeout_s: float | None,
    verbose: bool,
    no_wait: bool,
    idempotency_key: str | None,
    url: str | None,
    as_json: bool,
    **request_arguments: Any,
) -> None:
    """Generate, and save what comes of it.

    With --url or OMNIRT_URL a gateway runs the job; without, this process loads the model and runs it. Ctrl-C cancels
    the job.
    """
    request = request_from(**request_arguments)
    settings = load_settings()
    over_http = url is not None or settings.url is not None
    for option, given in (("--no-wait", no_wait), ("--idempotency-key", idempotency_key is not None)):
        if given and not over_http:
            raise click.UsageError(f"{option} needs a gateway: give --url or set OMNIRT_URL.")
    if no_wait:
        with client_for(url, settings) as client:
            job = client.submit(request, idempotency_key=idempotency_key)
        click.echo(json.dumps({"job": job.model_dump(mode="json"), "files": []}) if as_json else job.id)
        return
    if over_http:
        with client_for(url, settings) as client:
            submit = partial(client.submit, idempotency_key=idempotency_key)
            finish(_run(client, submit, request, timeout_s), output, downloads(client), as_json=as_json)
        return
    from workers.engine import OmniEngine

    # Unless the log is asked for, an error is told of in one line.
    logs.configure(settings if verbose else settings.model_copy(update={"log_level": "CRITICAL"}))
    with OmniEngine(settings=settings) as engine:
        request = with_files(request, data_url)
        finish(_run(engine, engine.submit, request, timeout_s), output, copy_output, as_json=as_json)


def _run(runner: Runner, submit: Submit, request: GenerateRequest, timeout_s: float | None) -> JobRecord:
    with JobProgress() as progress:
        job = submit(request)
        try:
            for event in runner.events(job.id, timeout_s=timeout_s):
                progress.show(event)
        except (KeyboardInterrupt, SystemExit):
            try:
                runner.cancel(job.id)
            except OmnirtError as error:
                tell(error, as_json=False)
            raise
    return runner.job(job.id)


def finish(job: JobRecord, output: Path | None, fetch: Fetch, *, as_json: bool) -> None:
    """Save a finished job's outputs into `output` (None: nowhere), tell of it, and exit with the code it earns."""
    files: list[Path] = []
    if job.state is JobState.SUCCEEDED and output is not None:
        files = save_outputs(job, output, fetch)
    if as_json:
        click.echo(json.dumps({"job": job.model_dump(mode="json"), "files": [str(file) for file in files]}))
    elif files:
        click.echo(told_outputs(result_of(job).outputs, files))
    if job.error is not None:
        tell(error_from(job.error), as_json=False)
    if job.state is JobState.FAILED:
        raise click.exceptions.Exit(Exit.FAILED)
    if job.state is JobState.CANCELLED:
        click.echo(f"The job {job.id} was cancelled.", err=True)
        raise click.exceptions.Exit(Exit.CANCELLED)


@click.command()
@request_options
@url_option
@json_option
def validate(url: str | None, as_json: bool, **request_arguments: Any) -> None:
    """Check a request, and show what it comes to; nothing is queued. Exits 2 if it would be refused."""
    request = request_from(**request_arguments)
    settings = load_settings()
    if url is not None or settings.url is not None:
        with client_for(url, settings) as client:
            resolution = client.validate(request)
    else:
        resolution = omnirt_tasks.validate(with_files(request, data_url))
    resolved = resolution.request
    if as_json:
        told = {
            "ok": resolved is not None,
            "errors": [problem.model_dump(mode="json") for problem in resolution.problems],
            "warnings": list(resolved.warnings) if resolved is not None else [],
            "request": resolved.model_dump(mode="json") if resolved is not None else None,
        }
        click.echo(json.dumps(told))
    elif resolved is None:
        for problem in resolution.problems:
            click.echo(f"{click.style(problem.loc, fg='red')}: {problem.message}", err=True)
    else:
        click.echo(f"{resolved.model} {resolved.task} on {resolved.backend}")
        for name, value in resolved.config.items():
            click.echo(f"  {name} = {json.dumps(value)}")
        for warning in resolved.warnings:
            click.echo(f"  warning: {warning}", err=True)
    if resolved is None:
        raise click.exceptions.Exit(Exit.REFUSED)
