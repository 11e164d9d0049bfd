"""What the queue adds to one unloaded job: over HTTP, against the same pipeline called in a loop in one process."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from omnirt_tasks import requests
from omnirt_tasks.bench.figures import MS_PER_S, SPREAD_COLUMNS, Row, Table, percentile, spread_ms
from omnirt_tasks.bench.plain import plain_pipeline
from omnirt_tasks.bench.running import running_system
from omnirt_tasks.client import Client
from omnirt_tasks.contract import EventName
from omnirt_tasks.registry import discover

PROMPT = "a large red circle on a blue background"
STEPS = 20
GUIDANCE = 7.5
WARM_UP = 3
SIZE_PX = 64


@dataclass(frozen=True)
class Times:
    """One job's times in seconds, from just before the submit."""

    first_step_s: float
    result_s: float


def measure(jobs: int, torch_threads: int) -> Iterator[int | Table]:
    """Run `jobs` jobs and `jobs` plain calls in turn; yields how many are done, then the table."""
    import torch

    torch.set_num_threads(torch_threads)
    spec = discover().find("shapes")
    assert spec.weights is not None
    pipeline = plain_pipeline(spec, spec.weights)

    def plain_call(seed: int) -> float:
        started = time.perf_counter()
        pipeline(
            prompt=PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            width=SIZE_PX,
            height=SIZE_PX,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        return time.perf_counter() - started

    queued: list[Times] = []
    plain: list[float] = []
    with (
        running_system(["cpu-shapes"], torch_threads=torch_threads, preview_every_steps=0) as (system, _),
        Client(system.url) as client,
    ):
        for seed in range(WARM_UP):
            _through_the_queue(client, seed)
            plain_call(seed)
        for seed in range(jobs):
            queued.append(_through_the_queue(client, seed))
            plain.append(plain_call(seed))
            yield seed + 1
    yield _table(queued, plain, torch_threads)


def _through_the_queue(client: Client, seed: int) -> Times:
    request = requests.text2image(
        model="shapes", prompt=PROMPT, seed=seed, num_inference_steps=STEPS, guidance_scale=GUIDANCE
    )
    started = time.perf_counter()
    job = client.submit(request)
    first_step_s = 0.0
    for event in client.events(job.id):
        if event.event is EventName.STAGE_PROGRESS and not first_step_s:
            first_step_s = time.perf_counter() - started
    return Times(first_step_s, time.perf_counter() - started)


def _table(queued: list[Times], plain: list[float], torch_threads: int) -> Table:
    results = [times.result_s for times in queued]
    added_ms = (percentile(results, 50) - percentile(plain, 50)) * MS_PER_S
    return Table(
        title="One unloaded job against a plain call",
        columns=SPREAD_COLUMNS,
        rows=(
            spread_ms("submit to first step seen by the client", [times.first_step_s for times in queued]),
            spread_ms("submit to result seen by the client", results),
            spread_ms("the same pipeline called in one process", plain),
            Row("added at p50", (f"{added_ms:.1f}", "", "")),
        ),
        note=(
            f"{len(plain)} of each in turn, shapes, {STEPS} steps, {torch_threads} torch thread(s) in each process. "
            "The job's time runs from the client's POST to the terminal event on its SSE stream, picture stored."
        ),
    )
