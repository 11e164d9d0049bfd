"""Where outputs go on the caller's disk: friendly names, and a picture in the terminal."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from omnirt_tasks.client import Client
from omnirt_tasks.contract import Artifact, JobRecord
from omnirt_tasks.errors import StorageError
from omnirt_tasks.results import result_of

DEFAULT_FOLDER = Path("out")
SLUG_CHARS = 60


Fetch = Callable[[Artifact, Path], object]


def save_outputs(job: JobRecord, output: Path, fetch: Fetch) -> list[Path]:
    """Save every output of a succeeded job, and return the files, in order.

    `output` is the file itself if it has a suffix and there is but one output, else a folder. `fetch` puts an output's
    bytes into a file, whose folder exists. Raises the job's error if it has no result, and StorageError when a file
    cannot be written.
    """
    outputs = result_of(job).outputs
    as_file = bool(output.suffix) and len(outputs) == 1 and not output.is_dir()
    targets = [output] if as_file else [output / friendly_name(job, artifact) for artifact in outputs]
    for artifact, target in zip(outputs, targets, strict=True):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fetch(artifact, target)
        except OSError as error:
            raise StorageError(f"{target} cannot be written: {error.strerror}.", "Name another --output.") from error
    return targets


def friendly_name(job: JobRecord, artifact: Artifact) -> str:
    """A file name that says what is in it: the words of its prompt, or the model, and the seed."""
    inputs = job.request.get("inputs")
    prompt = inputs.get("prompt") if isinstance(inputs, dict) else None
    if isinstance(prompt, list):  # as many outputs of each, in order
        prompt = prompt[artifact.index * len(prompt) // len(result_of(job).outputs)]
    words = prompt if isinstance(prompt, str) else str(job.request.get("model", ""))
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[:SLUG_CHARS].strip("-") or "output"
    number = artifact.index if artifact.seed is None else artifact.seed
    return f"{slug}-{number}{Path(artifact.name).suffix}"


def downloads(client: Client) -> Fetch:
    """How outputs of a gateway's jobs are fetched."""
    return lambda artifact, target: client.download(artifact, target.parent, name=target.name)


def copy_output(artifact: Artifact, target: Path) -> None:
    """Copy an output whose `path` is a local file."""
    shutil.copyfile(artifact.path, target)


def told_outputs(artifacts: Sequence[Artifact], files: Sequence[Path]) -> str:
    """A line per output: its file, and the seed that gives it again."""
    return "\n".join(
        str(file) if artifact.seed is None else f"{file}  (seed {artifact.seed})"
        for artifact, file in zip(artifacts, files, strict=True)
    )
