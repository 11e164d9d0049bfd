"""`omnirt calibrate MODEL`: measures how many jobs share a forward pass well, for the workers of this host."""

import re
from collections.abc import Iterator, Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnirt_tasks import requests
from omnirt_tasks.bench.figures import Row, Table
from omnirt_tasks.contract import GenerateRequest, ModelAbility
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.contract.request import AUTO
from omnirt_tasks.errors import OperatorError, error_from
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import load_settings

PROMPT = "a large red circle on a blue background"
STEPS = 12
ROUNDS = 2
"""How often each size is run: a size counts after a few calls, and the first ones also choose kernels."""

Size = tuple[int, int]


def _sizes(_ctx: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> tuple[Size, ...]:
    sizes = []
    for text in texts:
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
        if found is None:
            raise click.BadParameter(f"{text!r} is no size; write it as 512x512")
        sizes.append((int(found[1]), int(found[2])))
    return tuple(sizes)


@click.command()
@click.argument("model")
@click.option("--backend", default=AUTO, show_default=True, help="The backend to measure on.")
@click.option(
    "--size", "sizes", multiple=True, callback=_sizes, metavar="WxH", help="In pixels; the model's by default."
)
@click.option("--up-to", type=click.IntRange(2, 32), default=8, show_default=True, help="The most jobs at once.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="The model's by default.")
def calibrate(model: str, backend: str, sizes: tuple[Size, ...], up_to: int, dtype: str | None) -> None:
    """Measure how many jobs of MODEL share a forward pass well, and keep it for the workers of this host.

    A worker learns the same as it runs; start it after this, or again.
    """
    from workers.engine import OmniEngine

    settings = load_settings(preview_every_steps=0)
    spec = discover().find(model)
    wishes = [{"width": width, "height": height} for width, height in sizes] or [{}]
    counts = list(_doubling(up_to))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        OmniEngine(up_to, backend=backend, chunk_dir=settings.chunk_dir, settings=settings) as engine,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task(f"loading {spec.id}", total=len(wishes) * len(counts) * ROUNDS)
        for wish in wishes:
            for count in counts * ROUNDS:
                config = {**wish, **({} if dtype is None else {"dtype": dtype})}
                jobs = [engine.submit(_request(spec.id, backend, seed, config)) for seed in range(count)]
                for job in jobs:
                    ended = engine.wait(job.id)
                    if ended.error is not None:
                        raise error_from(ended.error)
                progress.update(bar, advance=1, description=f"{spec.id}, {count} at once")
        (ability,) = (worker.abilities[spec.id] for worker in engine.capabilities() if spec.id in worker.abilities)
    if ability.unchunked is not None:
        raise OperatorError(f"Jobs of {spec.id} share no forward pass: {ability.unchunked}.")
    click.echo(_table(ability, up_to).markdown())


def _request(model: str, backend: str, seed: int, config: dict[str, object]) -> GenerateRequest:
    return requests.text2image(
        model=model, backend=backend, prompt=PROMPT, seed=seed, num_inference_steps=STEPS, **config
    )


def _doubling(up_to: int) -> Iterator[int]:
    count = 1
    while count < up_to:
        yield count
        count *= 2
    yield up_to


def _table(ability: ModelAbility, up_to: int) -> Table:
    return Table(
        title="Rows that share a call",
        columns=("rows that pay", "gain over one by one", "ms by rows"),
        rows=tuple(_row(measure) for measure in ability.chunks),
        note=(
            f"Up to {up_to} jobs at once. A picture is one row of the denoiser, or two with guidance; rows pay as long "
            "as another one raises what is done per second by 5 %."
        ),
    )


def _row(measure: ChunkMeasure) -> Row:
    times = ", ".join(f"{rows}: {ms:.1f}" for rows, ms in measure.step_ms.items())
    return Row(f"{measure.module} {measure.shape}", (str(measure.limit), f"{measure.gain:.2f}", times))
