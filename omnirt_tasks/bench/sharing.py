"""What a chunk of each size brings on a device: jobs that share forward passes, against static calls of as many.

    n static pictures   pipe([prompt] * n)                        the ceiling
    n jobs at a time    a host's threads ─► device thread         a picture each, the next one begins when one ends

Chunks are as large as jobs wait, whatever was measured to pay: that is what is to be seen here. The time between two
forward passes of all n jobs, in which the device stands still, is told too.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnirt_tasks.bench.figures import MS_PER_S, Row, Table
from omnirt_tasks.bench.plain import plain_pipeline
from omnirt_tasks.bench.random_weights import SIZED
from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import OperatorError
from omnirt_tasks.registry import ModelSpec, discover

if TYPE_CHECKING:
    from workers.chunks.limits import MeasuredLimits, MeasureKey
    from workers.host import DeviceHost

PROMPT = "a large red circle on a blue background"
GUIDANCE = 7.5
CHUNKS = (1, 2, 4, 8)
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Subject:
    """What is drawn, and where: by a model with weights from `folder`, random ones of its size, or its own."""

    model: str
    device: str
    folder: Path | None
    random_weights: bool
    size_px: int
    steps: int
    dtype: str
    torch_threads: int

    @property
    def backend(self) -> str:
        """The device's backend: "cuda" of "cuda:0"."""
        return self.device.rpartition(":")[0]


@dataclass
class Turns:
    """What the turns of one size of chunk came to: pictures per second, and what was seen of forward passes."""

    static: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    filled: list[float] = field(default_factory=list)  # of each denoiser call's rows, as a share of the fullest one's
    forward_s: list[float] = field(default_factory=list)
    idle_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Forward:
    """A call that the device made: of which part, of how many rows, from when to when."""

    part: str
    rows: int
    began_s: float
    ended_s: float


def measure(subject: Subject, rounds: int, pictures: int) -> Iterator[int | Table]:
    """Draw `pictures` in chunks of each size, in both ways in turn; yields the rounds done, then the table.

    Two copies of the model are on the device. Raises ModelNotFound, ConfigurationError where there is no such device,
    OperatorError for a model without weights, and when a job fails.
    """
    from workers.backends import driver
    from workers.thread_host import ThreadHost

    spec = discover().find(subject.model)
    found = {chunk: Turns() for chunk in CHUNKS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omnirt-bench-")))
        seen: list[Forward] = []
        backend = driver(subject.backend, subject.device, subject.torch_threads)
        weights = _weights(subject, spec, folder, backend.torch_device)
        host = ThreadHost(
            backend=backend,
            models=[spec],
            folders={spec.id: weights},
            cache_size=1,
            concurrency=max(CHUNKS),
            limits=_recording(seen),
        )
        stack.callback(host.close)
        pipeline = plain_pipeline(spec, weights, backend.torch_device, subject.dtype)
        seeds = itertools.count()
        jobs = _Jobs(host, subject, spec, folder, seeds)

        def static(chunk: int) -> float:
            return _rate(lambda: _draw(pipeline, subject, chunk, pictures, folder, seeds), pictures)

        def through_the_host(chunk: int) -> float:
            return _rate(lambda: jobs.draw(chunk, pictures), pictures)

        for chunk in CHUNKS:  # weights are loaded, kernels chosen, memory is taken
            static(chunk)
            jobs.draw(chunk, 2 * chunk)
        for done in range(1, rounds + 1):
            for chunk, turns in found.items():
                turns.static.append(static(chunk))
                seen.clear()
                turns.jobs.append(through_the_host(chunk))
                _note_forwards(turns, seen)
            yield done
        name = host.capability().device_name or subject.device
    yield _table(found, subject, name, rounds, pictures)


def _recording(seen: list[Forward]) -> "MeasuredLimits":
    from workers.chunks.curve import ROWS_MAX
    from workers.chunks.limits import MeasuredLimits

    class Recording(MeasuredLimits):
        """Bounds nothing, and keeps what was made."""

        def rows_max(self, key: "MeasureKey") -> int:
            return ROWS_MAX

        def note(self, key: "MeasureKey", rows: int, elapsed_s: float) -> None:
            now_s = time.perf_counter()
            seen.append(Forward(key.part, rows, now_s - elapsed_s, now_s))
            super().note(key, rows, elapsed_s)

    return Recording()


class _Jobs:
    """Pictures as jobs of a host."""

    def __init__(
        self, host: "DeviceHost", subject: Subject, spec: ModelSpec, folder: Path, seeds: Iterator[int]
    ) -> None:
        self._host = host
        self._seeds = seeds
        self._folder = folder
        usual: JsonObject = {name: option.default for name, option in spec.tasks[Task.TEXT2IMAGE].options.items()}
        self._config: JsonObject = usual | {
            "num_inference_steps": subject.steps,
            "guidance_scale": GUIDANCE,
            "width": subject.size_px,
            "height": subject.size_px,
            "scheduler": "native",
            "dtype": subject.dtype,
        }
        self._spec = spec
        self._backend = subject.backend

    def draw(self, chunk: int, pictures: int) -> None:
        """Draw so many, `chunk` at a time."""
        with ThreadPoolExecutor(chunk) as pool:
            list(pool.map(self._job, itertools.islice(self._seeds, pictures)))

    def _job(self, seed: int) -> None:
        from workers.host import RunOrder, RunSucceeded

        output_dir = self._folder / f"job-{seed}"
        output_dir.mkdir()
        request = ResolvedRequest(
            task=Task.TEXT2IMAGE,
            model=self._spec.id,
            backend=self._backend,
            inputs=Inputs(prompt=PROMPT),
            config=self._config | {"seed": seed},
        )
        outcome = self._host.submit(RunOrder(f"bench-{seed}", 1, request, output_dir), _unheard).result()
        if not isinstance(outcome, RunSucceeded):
            raise OperatorError(f"A job of the bench failed: {outcome}")


def _unheard(_event: object) -> None:
    """Nobody listens."""


def _weights(subject: Subject, spec: ModelSpec, folder: Path, device: str) -> Path:
    if subject.random_weights:
        make = SIZED.get(spec.id)
        if make is None:
            raise OperatorError(
                f"Random weights of the size of {spec.id} are not known here.", f"Name {' or '.join(SIZED)}."
            )
        make(device).save_pretrained(folder / "weights", safe_serialization=True)
        return folder / "weights"
    weights = subject.folder or spec.weights
    if weights is None:
        raise OperatorError(
            f"The model {spec.id!r} ships without weights.", "Name their folder with --folder, or ask for --random."
        )
    return weights


def _draw(pipeline: Any, subject: Subject, chunk: int, pictures: int, folder: Path, seeds: Iterator[int]) -> None:
    """As many static calls as give so many pictures."""
    import torch

    for _ in range(pictures // chunk):
        drawn = pipeline(
            prompt=[PROMPT] * chunk,
            num_inference_steps=subject.steps,
            guidance_scale=GUIDANCE,
            width=subject.size_px,
            height=subject.size_px,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in itertools.islice(seeds, chunk)],
        )
        for number, picture in enumerate(drawn.images):
            picture.save(folder / f"static-{number}.png")


def _rate(draw: Callable[[], None], pictures: int) -> float:
    started = time.perf_counter()
    draw()
    return pictures / (time.perf_counter() - started)


def _note_forwards(turns: Turns, seen: Sequence[Forward]) -> None:
    """Keep the times of full denoiser calls, and what passed between two that follow each other directly."""
    rows = [forward.rows for forward in seen if forward.part in DENOISERS]
    full = max(rows)
    turns.filled += [each / full for each in rows]
    for before, forward in itertools.pairwise(seen):
        if all(each.part in DENOISERS and each.rows == full for each in (before, forward)):
            turns.forward_s.append(forward.ended_s - forward.began_s)
            turns.idle_s.append(max(forward.began_s - before.ended_s, 0.0))


def _table(found: Mapping[int, Turns], subject: Subject, device_name: str, rounds: int, pictures: int) -> Table:
    def row(chunk: int) -> Row:
        turns, single = found[chunk], found[CHUNKS[0]]
        forward_s = statistics.median(turns.forward_s)
        return Row(
            str(chunk),
            (
                f"{statistics.median(turns.static):.3f}",
                f"{statistics.median(turns.jobs):.3f}",
                f"{_ratio(turns.jobs, turns.static):.2f}",
                f"{_ratio(turns.jobs, single.jobs):.2f}",
                f"{statistics.fmean(turns.filled) * chunk:.1f}",
                f"{forward_s * MS_PER_S:.2f}",
                f"{statistics.median(turns.idle_s) * MS_PER_S:.2f}",
                f"{statistics.median(turns.idle_s) / forward_s:.0%}",
            ),
        )

    made_of = "random weights of its size" if subject.random_weights else "its weights"
    return Table(
        title=f"Chunks of {subject.model}, {subject.size_px} px, on {device_name}",
        columns=(
            "static, pictures/s",
            "jobs, pictures/s",
            "jobs / static",
            "jobs / one at a time",
            "jobs a forward, mean",
            "forward ms",
            "idle between, ms",
            "idle / forward",
        ),
        rows=tuple(row(chunk) for chunk in CHUNKS),
        note=(
            f"{rounds} rounds of {pictures} pictures in turn, {subject.steps} steps, guidance, {subject.dtype}, "
            f"{made_of}, {subject.torch_threads} torch thread(s), host and static calls in one process; medians over "
            "rounds, and over forward passes of all jobs."
        ),
    )


def _ratio(ours: Sequence[float], its: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, its, strict=True))
