"""What it costs to keep models on a device: loads, what the host adds to a picture, and memory over many switches."""

import dataclasses
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil

from omnirt_tasks.bench.figures import MS_PER_S, SPREAD_COLUMNS, Row, Table, percentile, spread_ms
from omnirt_tasks.bench.plain import plain_pipeline
from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from omnirt_tasks.registry import ModelSpec, discover

if TYPE_CHECKING:
    from workers.host import RunFacts
    from workers.thread_host import ThreadHost

PROMPT = "a large red circle on a blue background"
STEPS = 20
SWITCH_STEPS = 1
COPIES = 4
WARM_UP = 3
LOADS = 20
MEMORY_SAMPLES = 5
RUN_TIMEOUT_S = 120.0
MIB = 1024 * 1024
BACKEND = "cpu"


def steps(pictures: int, switches: int) -> int:
    """How far `measure` counts."""
    return LOADS + 2 * pictures + switches


def measure(pictures: int, switches: int, torch_threads: int) -> Iterator[int | Table]:
    """Measure copies of `shapes` on a thread host on the CPU; yields how far it is, and each table once it is there.

    Each way of making them makes `pictures` pictures, and the model changes `switches` times.
    """
    with tempfile.TemporaryDirectory(prefix="omnirt-bench-", ignore_cleanup_errors=True) as folder:
        models = _copies(Path(folder) / "weights")
        scratch = Path(folder) / "outputs"
        done = 0
        for part in (
            _loads(models, scratch, torch_threads),
            _added(models, scratch, torch_threads, pictures),
            _switches(models[:2], scratch, torch_threads, switches),
        ):
            for step in part:
                if isinstance(step, Table):
                    yield step
                else:
                    done += 1
                    yield done


def _loads(models: Sequence[ModelSpec], scratch: Path, torch_threads: int) -> Iterator[int | Table]:
    first, second = models[:2]
    with _host(models, 1, torch_threads) as host:
        cold_s = _load_s(_run(host, first, scratch))
        warm, switched, evicted = [], [], []
        for number in range(LOADS):
            warm.append(_load_s(_run(host, first, scratch)))
            _run(host, second, scratch)
            switched.append(_load_s(_run(host, first, scratch)))
            started = time.perf_counter()
            host.unload_idle()
            evicted.append(time.perf_counter() - started)
            _run(host, first, scratch)
            yield number
    yield Table(
        title="Loads",
        columns=SPREAD_COLUMNS,
        rows=(
            Row("first load in a process, libraries and all", (f"{cold_s * MS_PER_S:.0f}", "", "")),
            spread_ms("warm start: the model is there", warm),
            spread_ms("eviction", evicted),
            spread_ms("another model evicted, this one loaded again", switched),
        ),
        note=(
            f"shapes (21 MB in fp32), a thread host on the CPU, {torch_threads} torch thread(s), {LOADS} of each. "
            "Files are in the system's cache. The time of a load is that of the run's stage `load`."
        ),
    )


def _added(models: Sequence[ModelSpec], scratch: Path, torch_threads: int, pictures: int) -> Iterator[int | Table]:
    import torch

    torch.set_num_threads(torch_threads)
    pipelines = [plain_pipeline(spec, spec.weights) for spec in models if spec.weights is not None]

    def alone(number: int, seed: int) -> float:
        started = time.perf_counter()
        picture = pipelines[number](
            prompt=PROMPT, num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(seed)
        )
        picture.images[0].save(scratch / "alone.png")
        return time.perf_counter() - started

    rows = []
    for count in (1, COPIES):
        plain, hosted = [], []
        with _host(models[:count], count, torch_threads) as host:

            def through_the_host(number: int, seed: int, host: "ThreadHost" = host) -> float:
                started = time.perf_counter()
                _run(host, models[number], scratch, seed=seed, num_inference_steps=STEPS)
                return time.perf_counter() - started

            for seed in range(WARM_UP * count):
                alone(seed % count, seed), through_the_host(seed % count, seed)
            for seed in range(pictures):  # in turn, so that whatever else the machine does meets both alike
                plain.append(alone(seed % count, seed))
                hosted.append(through_the_host(seed % count, seed))
                yield seed
        added_s = median(one - other for one, other in zip(hosted, plain, strict=True))
        share = percentile(plain, 50) / percentile(hosted, 50)
        name = "one model" if count == 1 else f"{count} models in turn"
        rows.append(
            Row(
                name,
                (
                    f"{percentile(plain, 50) * MS_PER_S:.1f}",
                    f"{percentile(hosted, 50) * MS_PER_S:.1f}",
                    f"{added_s * MS_PER_S:+.1f}",
                    f"{share:.3f}",
                ),
            )
        )
    yield Table(
        title="A picture through the host against the pipeline called alone",
        columns=(
            "alone, p50 ms",
            "through the host, p50 ms",
            "added, median of pairs, ms",
            "pictures/s of the pipeline",
        ),
        rows=tuple(rows),
        note=(
            f"{pictures} pairs each, shapes under {COPIES} names, {STEPS} steps, {torch_threads} torch thread(s), no "
            "previews. Both ways end with the PNG on disk."
        ),
    )


def _switches(models: Sequence[ModelSpec], scratch: Path, torch_threads: int, switches: int) -> Iterator[int | Table]:
    share = max(switches // MEMORY_SAMPLES, 1)
    samples = []
    with _host(models, 1, torch_threads) as host:
        turns = itertools.cycle(models)
        for _ in range(2 * WARM_UP):
            _run(host, next(turns), scratch)
        samples.append(_resident_mib())
        for number in range(1, switches + 1):
            _run(host, next(turns), scratch)
            if number % share == 0:
                samples.append(_resident_mib())
            yield number
    yield Table(
        title=f"Memory over {switches} switches of the model",
        columns=(*(f"after {number * share}, MiB" for number in range(len(samples))), "growth, MiB"),
        rows=(Row("process", (*(f"{taken:.1f}" for taken in samples), f"{samples[-1] - samples[0]:+.1f}")),),
        note=(
            "Resident memory of a thread host that keeps one of two copies of shapes (21 MB): each switch evicts one "
            f"and loads the other, for a picture of {SWITCH_STEPS} step. {2 * WARM_UP} switches come before the first "
            "sample."
        ),
    )


def _copies(folder: Path) -> list[ModelSpec]:
    """`shapes` under several names, each with weights of its own."""
    spec = discover().find("shapes")
    assert spec.weights is not None
    return [
        dataclasses.replace(
            spec,
            id=f"shapes-{number}",
            aliases=(),
            weights=Path(shutil.copytree(spec.weights, folder / str(number))),
        )
        for number in range(COPIES)
    ]


@contextmanager
def _host(models: Sequence[ModelSpec], cache_size: int, torch_threads: int) -> Iterator["ThreadHost"]:
    from workers.backends import driver
    from workers.thread_host import ThreadHost

    host = ThreadHost(
        backend=driver(BACKEND, torch_threads=torch_threads),
        models=models,
        folders={spec.id: spec.weights for spec in models if spec.weights is not None},
        cache_size=cache_size,
        concurrency=1,
    )
    try:
        yield host
    finally:
        host.close()


def _run(
    host: "ThreadHost", spec: ModelSpec, scratch: Path, *, seed: int = 0, num_inference_steps: int = SWITCH_STEPS
) -> "RunFacts":
    """Run a job of one picture to its end, with the model's defaults."""
    from workers.host import RunOrder, RunSucceeded

    defaults = {name: option.default for name, option in spec.tasks[Task.TEXT2IMAGE].options.items()}
    request = ResolvedRequest(
        task=Task.TEXT2IMAGE,
        model=spec.id,
        backend=BACKEND,
        inputs=Inputs(prompt=PROMPT),
        config=defaults | {"seed": seed, "num_inference_steps": num_inference_steps},
    )
    scratch.mkdir(exist_ok=True)
    outcome = host.submit(RunOrder(f"bench-{seed}", 1, request, scratch), _unheard).result(RUN_TIMEOUT_S)
    assert isinstance(outcome, RunSucceeded), outcome
    return outcome.facts


def _unheard(event: object) -> None:
    del event


def _load_s(facts: "RunFacts") -> float:
    return facts.timings_ms["load"] / MS_PER_S


def _resident_mib() -> float:
    return float(psutil.Process().memory_info().rss) / MIB
