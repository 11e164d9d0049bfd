"""What sharing forward passes brings: jobs at once through the whole system, against the same without, and batchers."""

import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from omnirt_tasks import requests
from omnirt_tasks.bench.figures import MS_PER_S, Row, Table, percentile
from omnirt_tasks.bench.plain import plain_pipeline
from omnirt_tasks.bench.running import running_system
from omnirt_tasks.client import Client
from omnirt_tasks.contract import EventName, GenerateRequest, JobRecord
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import OperatorError
from omnirt_tasks.registry import ModelSpec, discover

PROMPT = "a large red circle on a blue background"
AT_ONCE = 8
WINDOW_MS = 50.0
JOB_TIMEOUT_S = 300.0
LONG_STEPS = 100
"""The steps of the jobs that run while another one arrives."""
ETA_EVERY = 4
"""Of so many jobs one is asked when it will be done."""


@dataclass(frozen=True)
class Subject:
    """What is drawn: a model with the weights in `folder` (None: those that it ships with), and how."""

    model: str
    folder: Path | None
    size_px: int
    steps: int
    guidance_scale: float = 7.5

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        return discover().find(self.model)

    @property
    def weights(self) -> Path:
        """Where they lie. Raises OperatorError for a model that has none here."""
        folder = self.folder or self.spec.weights
        if folder is None:
            raise OperatorError(f"The model {self.model!r} ships without weights.", "Name their folder with --folder.")
        return folder

    def request(self, seed: int, steps: int | None = None) -> GenerateRequest:
        """A job of one picture."""
        return requests.text2image(
            model=self.model, backend="cpu", prompt=PROMPT, seed=seed, num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance_scale, width=self.size_px, height=self.size_px, dtype="fp32",
        )  # fmt: skip


def measure(subject: Subject, rounds: int, jobs: int, torch_threads: int) -> Iterator[int | Table]:
    """Run `jobs` jobs in each way in turn, `rounds` times; yields the rounds done, then the tables."""
    throughput: dict[str, list[float]] = {}
    with ExitStack() as stack:
        pipeline = _Pipeline(subject, torch_threads, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        merged = stack.enter_context(_system(subject, torch_threads))
        unmerged = stack.enter_context(_system(subject, torch_threads, max_batch_size=1))
        ways: dict[str, Callable[[], float]] = {
            "merged": lambda: merged.jobs_per_s(jobs),
            "merging off": lambda: unmerged.jobs_per_s(jobs),
            "static call of 8": lambda: pipeline.jobs_per_s(jobs),
            f"window of {WINDOW_MS:g} ms": lambda: pipeline.window_jobs_per_s(jobs),
        }
        for _ in range(2):  # what is measured decides how many share, so it is measured first
            for way in ways.values():
                way()
        alone: dict[str, list[float]] = {"merged": [], "merging off": []}
        for done in range(1, rounds + 1):
            for name, way in ways.items():
                throughput.setdefault(name, []).append(way())
            for _ in range(4):
                for name, system in (("merged", merged), ("merging off", unmerged)):
                    alone[name].append(system.job_s())
            yield done
        yield _throughput(subject, throughput, rounds, jobs, torch_threads)
        yield _details(subject, merged, alone, jobs)


@contextmanager
def _system(subject: Subject, torch_threads: int, **settings: object) -> Iterator["_Running"]:
    fixed = {"torch_threads": torch_threads, "preview_every_steps": 0, "concurrency": AT_ONCE + 1}
    own: dict[str, object] = {**fixed, **settings}
    if subject.folder is not None:
        own["model_folders"] = {subject.model: str(subject.folder)}
    with running_system([f"cpu-{subject.spec.queue}"], **own) as (system, _), Client(system.url) as client:
        yield _Running(subject, client)


class _Running:
    """A system at work, and its caller."""

    def __init__(self, subject: Subject, client: Client) -> None:
        self._subject = subject
        self._client = client
        self._seeds = iter(range(10**9))
        self.mean_sizes: list[float] = []

    def jobs_per_s(self, jobs: int) -> float:
        """All at once; from the first submit to the end of the last."""
        started = time.perf_counter()
        ids = [self._client.submit(self._subject.request(next(self._seeds))).id for _ in range(jobs)]
        done = [self._done(job_id) for job_id in ids]
        elapsed_s = time.perf_counter() - started
        reports = [job.result.metadata for job in done if job.result is not None]
        self.mean_sizes = [report.batch_size_mean for report in reports]
        return jobs / elapsed_s

    def job_s(self) -> float:
        """One job, with nothing beside it."""
        started = time.perf_counter()
        self._done(self._client.submit(self._subject.request(next(self._seeds))).id)
        return time.perf_counter() - started

    def joined_after_steps(self) -> float:
        """How many steps of eight running jobs pass from the submit of another one to its own first step."""
        running = [self._client.submit(self._subject.request(next(self._seeds), LONG_STEPS)).id for _ in range(AT_ONCE)]
        for job_id in running:
            next(event for event in self._client.events(job_id) if event.event is EventName.STAGE_PROGRESS)
        joiner = self._client.submit(self._subject.request(next(self._seeds), 2)).id
        events = list(self._client.events(joiner))
        first_ms = next(event.timestamp_ms for event in events if event.event is EventName.STAGE_PROGRESS)
        steps = [event for event in self._client.events(running[0]) if event.event is EventName.STAGE_PROGRESS]
        step_ms = (steps[-1].timestamp_ms - steps[0].timestamp_ms) / (len(steps) - 1)
        for job_id in running:
            self._done(job_id)
        return (first_ms - events[0].timestamp_ms) / step_ms

    def eta_errors(self, jobs: int) -> Sequence[tuple[float, bool]]:
        """Of jobs that wait: how far off eta_s was, as a share of what it took, and whether eta_p90_s was enough."""
        ids = [self._client.submit(self._subject.request(next(self._seeds))).id for _ in range(jobs)]
        asked = [(job, time.time()) for job in map(self._client.job, ids[::ETA_EVERY])]
        done = [self._done(job_id) for job_id in ids][::ETA_EVERY]
        errors: list[tuple[float, bool]] = []
        for (job, at_s), ended in zip(asked, done, strict=True):
            status = job.queue
            if status is None or status.eta_s is None or status.eta_p90_s is None or ended.finished_at_ms is None:
                continue  # it ran already
            took_s = max(ended.finished_at_ms / MS_PER_S - at_s, 0.001)
            errors.append((abs(status.eta_s - took_s) / took_s, took_s <= status.eta_p90_s))
        return errors

    def _done(self, job_id: str) -> JobRecord:
        job = self._client.wait(job_id, timeout_s=JOB_TIMEOUT_S)
        if job.result is None:
            raise OperatorError(f"A job of the bench failed: {job.error}")
        return job


class _Pipeline:
    """The same pictures by the bare pipeline in this process, eight to a call."""

    def __init__(self, subject: Subject, torch_threads: int, folder: Path) -> None:
        import torch

        torch.set_num_threads(torch_threads)
        self._call = plain_pipeline(subject.spec, subject.weights)
        self._subject = subject
        self._folder = folder

    def jobs_per_s(self, jobs: int) -> float:
        """Static calls, one after another: the ceiling."""
        started = time.perf_counter()
        for begin in range(0, jobs, AT_ONCE):
            self._draw(range(begin, min(begin + AT_ONCE, jobs)))
        return jobs / (time.perf_counter() - started)

    def window_jobs_per_s(self, jobs: int) -> float:
        """A batcher that takes what has come within a window after the first, eight at most, to one static call."""
        line: queue.Queue[int] = queue.Queue()
        started = time.perf_counter()
        for seed in range(jobs):
            line.put(seed)
        done = 0
        while done < jobs:
            batch = [line.get()]
            closes = time.perf_counter() + WINDOW_MS / MS_PER_S
            while len(batch) < AT_ONCE and (left_s := closes - time.perf_counter()) > 0:
                try:
                    batch.append(line.get(timeout=left_s))
                except queue.Empty:
                    break
            self._draw(batch)
            done += len(batch)
        return jobs / (time.perf_counter() - started)

    def _draw(self, seeds: Sequence[int]) -> None:
        import torch

        subject = self._subject
        wishes: JsonObject = {"num_inference_steps": subject.steps, "guidance_scale": subject.guidance_scale}
        pictures = self._call(
            prompt=[PROMPT] * len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            width=subject.size_px,
            height=subject.size_px,
            **wishes,
        ).images
        for seed, picture in zip(seeds, pictures, strict=True):
            picture.save(self._folder / f"{seed}.png")


def _throughput(subject: Subject, found: dict[str, list[float]], rounds: int, jobs: int, torch_threads: int) -> Table:
    rows = [
        Row(name, (f"{median(rates):.2f}", f"{min(rates):.2f}", f"{max(rates):.2f}")) for name, rates in found.items()
    ]
    merged, *others = found
    for other in others:
        ratios = [ours / its for ours, its in zip(found[merged], found[other], strict=True)]
        rows.append(Row(f"merged / {other}", tuple(f"{of(ratios):.2f}" for of in (median, min, max))))
    return Table(
        title=f"{jobs} jobs of {subject.model} at once",
        columns=("jobs/s (median)", "least", "most"),
        rows=tuple(rows),
        note=(
            f"{rounds} rounds in turn, {subject.size_px} px, {subject.steps} steps, guidance, fp32, {torch_threads} "
            "torch thread(s) in each process. Merged and off: through gateway, Celery and a worker's device process. "
            "Static and window: the bare pipeline in one process, no queue."
        ),
    )


def _details(subject: Subject, merged: _Running, alone: dict[str, list[float]], jobs: int) -> Table:
    joined = [merged.joined_after_steps() for _ in range(5)]
    merged.jobs_per_s(jobs)
    sizes = merged.mean_sizes
    eta = merged.eta_errors(4 * jobs)
    rows = [
        Row("jobs that share a forward pass, mean", (f"{sum(sizes) / len(sizes):.2f}",)),
        Row("one job at a time, merging on, p50 ms", (f"{percentile(alone['merged'], 50) * MS_PER_S:.0f}",)),
        Row("one job at a time, merging off, p50 ms", (f"{percentile(alone['merging off'], 50) * MS_PER_S:.0f}",)),
        Row("steps until a job that arrives beside eight has made its first, median", (f"{median(joined):.1f}",)),
        Row("the same, most", (f"{max(joined):.1f}",)),
    ]
    if eta:
        rows += [
            Row("error of eta_s, median share of what it took", (f"{median(error for error, _ in eta):.0%}",)),
            Row("ended within eta_p90_s", (f"{sum(enough for _, enough in eta)} of {len(eta)}",)),
        ]
    return Table(
        title=f"Sharing in detail, {subject.model}",
        columns=("",),
        rows=tuple(rows),
        note=f"The same run. Steps are those of the eight, {LONG_STEPS} each, by the store's clock; five times.",
    )
