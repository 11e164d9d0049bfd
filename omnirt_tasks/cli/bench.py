"""`omnirt bench`: what the project measures of itself, each against something else in the same run."""

from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnirt_tasks.bench.figures import Table


@click.group(invoke_without_command=True)
@click.pass_context
def bench(ctx: click.Context) -> None:
    """Measure this installation; without a name, all that needs no GPU. Tables go to standard output, as Markdown."""
    if ctx.invoked_subcommand is None:
        for command in (submit, durability, recovery, latency, chunking, sharing, placement, stream, memory, models):
            ctx.invoke(command)


@bench.command()
@click.option("--rounds", default=5, show_default=True, help="Turns of each server.")
@click.option("--seconds", default=4.0, show_default=True, help="Length of a turn.")
@click.option("--clients", default=8, show_default=True)
def submit(rounds: int, seconds: float, clients: int) -> None:
    """Submits a second, against a naive Flask handler on the same server."""
    from omnirt_tasks.bench import submit as module

    _run("submit", module.measure(rounds, seconds, clients), rounds)


@bench.command()
@click.option("--jobs", default=40, show_default=True)
@click.option("--torch-threads", default=1, show_default=True, help="In the worker, and in the process beside it.")
def latency(jobs: int, torch_threads: int) -> None:
    """One unloaded job of `shapes`, against the same pipeline called in a loop."""
    from omnirt_tasks.bench import latency as module

    _run("latency", module.measure(jobs, torch_threads), jobs)


@bench.command()
@click.option("--model", default="shapes", show_default=True)
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of its weights.")
@click.option("--size", default=64, show_default=True, help="Width and height in pixels.")
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Turns of each way.")
@click.option("--jobs", default=24, show_default=True, help="Of a turn.")
@click.option("--torch-threads", default=1, show_default=True, help="Of each process.")
def chunking(
    model: str, folder: Path | None, size: int, steps: int, rounds: int, jobs: int, torch_threads: int
) -> None:
    """Jobs that share forward passes, against the same without, a static call and a time-window batcher."""
    from omnirt_tasks.bench import chunking as module

    subject = module.Subject(model, folder, size, steps)
    _run("chunking", module.measure(subject, rounds, jobs, torch_threads), rounds)


@bench.command()
@click.option("--model", default="shapes", show_default=True)
@click.option("--device", default="cpu:0", show_default=True)
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of its weights.")
@click.option("--random", is_flag=True, help="Random weights of the model's size: sdxl-base-1.0, sd15.")
@click.option("--size", default=64, show_default=True, help="Width and height in pixels.")
@click.option("--steps", default=20, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Turns of each size of chunk, in each way.")
@click.option("--pictures", default=16, show_default=True, help="Of a turn; a multiple of 8.")
@click.option("--torch-threads", default=1, show_default=True)
def sharing(
    model: str,
    device: str,
    folder: Path | None,
    random: bool,
    size: int,
    steps: int,
    dtype: str,
    rounds: int,
    pictures: int,
    torch_threads: int,
) -> None:
    """Pictures a second by size of chunk, jobs against static calls, and how long the device idles between them."""
    from omnirt_tasks.bench import sharing as module

    subject = module.Subject(model, device, folder, random, size, steps, dtype, torch_threads)
    _run("sharing", module.measure(subject, rounds, pictures), rounds)


@bench.command()
@click.option("--rounds", default=7, show_default=True, help="Turns of each placement.")
@click.option("--jobs", default=16, show_default=True, help="Jobs of a turn, eight at once.")
@click.option("--torch-threads", default=1, show_default=True)
def placement(rounds: int, jobs: int, torch_threads: int) -> None:
    """Eight jobs at once, with the device in a process of its own against a thread."""
    from omnirt_tasks.bench import placement as module

    _run("placement", module.measure(rounds, jobs, torch_threads), rounds)


@bench.command()
@click.option("--events", default=1_000, show_default=True)
def stream(events: int) -> None:
    """From the worker's write of an event to an SSE client."""
    from omnirt_tasks.bench import stream as module

    _run("stream", module.measure(events), events)


@bench.command()
@click.option("--jobs", default=1_000, show_default=True)
def memory(jobs: int) -> None:
    """The memory of each process over many jobs."""
    from omnirt_tasks.bench import memory as module

    _run("memory", module.measure(jobs), jobs)


@bench.command()
@click.option("--rounds", default=5, show_default=True, help="Turns of each side.")
@click.option("--pictures", default=8, show_default=True, help="Of a turn.")
@click.option("--steps", default=30, show_default=True)
@click.option("--device", default="cuda:0", show_default=True)
def device(rounds: int, pictures: int, steps: int, device: str) -> None:
    """Pictures a second of an SDXL-sized model on a GPU, against the raw pipeline; only where it is named."""
    from omnirt_tasks.bench import device as module

    _run("device", module.measure(rounds, pictures, steps, device), rounds)


@bench.command()
@click.option("--pictures", default=60, show_default=True, help="Pictures made in each way.")
@click.option("--switches", default=200, show_default=True, help="How often the model changes.")
@click.option("--torch-threads", default=1, show_default=True)
def models(pictures: int, switches: int, torch_threads: int) -> None:
    """Loads, switches of the model and their memory, and what the host adds to a picture."""
    from omnirt_tasks.bench import models as module

    _run("models", module.measure(pictures, switches, torch_threads), module.steps(pictures, switches))


@bench.command()
@click.option("--rounds", default=5, show_default=True, help="Turns of each broker.")
@click.option("--seconds", default=4.0, show_default=True, help="Of submits, in a turn.")
@click.option("--clients", default=8, show_default=True)
@click.option("--jobs", default=2_000, show_default=True, help="Claimed and committed in a turn.")
def durability(rounds: int, seconds: float, clients: int, jobs: int) -> None:
    """Submits, claims and commits a second, by when the broker's data reach the disk."""
    from omnirt_tasks.bench import durability as module

    _run("durability", module.measure(rounds, seconds, clients, jobs), rounds)


@bench.command()
@click.option("--times", default=20, show_default=True, help="Kills of a worker, and of a device's process.")
@click.option("--restarts", default=5, show_default=True, help="Kills of the only worker.")
@click.option("--outages", default=5, show_default=True, help="Kills of Redis.")
def recovery(times: int, restarts: int, outages: int) -> None:
    """From the kill of a worker, a device's process or Redis until work goes on."""
    from omnirt_tasks.bench import recovery as module

    _run("recovery", module.measure(times, restarts, outages), module.steps(times, restarts, outages))


def _run(name: str, measuring: Iterator[int | Table], total: int) -> None:
    """Show progress on standard error while it measures, then print its table."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(name, total=total)
        for step in measuring:
            if isinstance(step, Table):
                progress.stop()
                click.echo(step.markdown())
            else:
                progress.update(bar, completed=step)
