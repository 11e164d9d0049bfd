"""What the pipe to the device's process costs: the same jobs, eight at once, in both placements of the device side."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import ExitStack
from pathlib import Path

from omnirt_tasks.bench.figures import Row, Table
from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import OperatorError
from omnirt_tasks.registry import discover

PROMPT = "a large red circle on a blue background"
STEPS = 20
AT_ONCE = 8
THREAD, PROCESS = "thread", "process"
START_TIMEOUT_S = 120.0
START_POLL_S = 0.05


def measure(rounds: int, jobs: int, torch_threads: int) -> Iterator[int | Table]:
    """Run `jobs` jobs of shapes, eight at once, in each placement in turn; yields the rounds done, then the table."""
    from workers.host import DeviceHost, HostConfig, HostEvent, RunOrder, RunSucceeded
    from workers.process_host import ProcessHost
    from workers.thread_host import ThreadHost

    spec = discover().find("shapes")
    assert spec.weights is not None
    config = HostConfig(
        backend="cpu",
        device="cpu:0",
        models=(spec.id,),
        folders={spec.id: spec.weights},
        cache_size=1,
        concurrency=AT_ONCE,
        torch_threads=torch_threads,
        warm_up=(spec.id,),
    )
    numbers = itertools.count()
    events: list[HostEvent] = []

    def order(folder: Path) -> RunOrder:
        number = next(numbers)
        output_dir = folder / str(number)
        output_dir.mkdir()
        wishes: JsonObject = {"seed": number, "num_inference_steps": STEPS, "guidance_scale": 7.5, "dtype": "fp32"}
        size: JsonObject = {"width": 64, "height": 64, "num_images_per_prompt": 1, "scheduler": "native"}
        request = ResolvedRequest(
            task=Task.TEXT2IMAGE, model=spec.id, backend="cpu", inputs=Inputs(prompt=PROMPT), config=wishes | size
        )
        return RunOrder(f"bench-{number}", 1, request, output_dir, preview_every_steps=5)

    def jobs_per_s(host: DeviceHost, folder: Path) -> float:
        orders = [order(folder) for _ in range(jobs)]
        started = time.perf_counter()
        for begin in range(0, jobs, AT_ONCE):
            futures = [host.submit(one, events.append) for one in orders[begin : begin + AT_ONCE]]
            wait(futures)
            for future in futures:
                if not isinstance(outcome := future.result(), RunSucceeded):
                    raise OperatorError(f"A job of the bench failed: {outcome}")
        return jobs / (time.perf_counter() - started)

    found: dict[str, list[float]] = {THREAD: [], PROCESS: []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omnirt-bench-")))
        thread = ThreadHost.from_config(config)
        stack.callback(thread.close)
        thread.warm_up()
        process = ProcessHost(config, on_line=lambda _: None)
        stack.callback(process.close)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not process.health().ok:
            if time.monotonic() > deadline:
                raise OperatorError(f"The device's process is not ready: {process.health().detail}")
            time.sleep(START_POLL_S)
        hosts: dict[str, DeviceHost] = {THREAD: thread, PROCESS: process}
        for host in hosts.values():
            jobs_per_s(host, folder)  # warm
        for done in range(1, rounds + 1):
            for name, host in hosts.items():
                found[name].append(jobs_per_s(host, folder))
            yield done
    yield _table(found, rounds, jobs, torch_threads)


def _table(found: dict[str, list[float]], rounds: int, jobs: int, torch_threads: int) -> Table:
    ratios = [ours / its for ours, its in zip(found[PROCESS], found[THREAD], strict=True)]
    return Table(
        title="Eight jobs at once, by where the device side lives",
        columns=("jobs/s (median)", "least", "most"),
        rows=tuple(
            Row(name, tuple(f"{figure:.3f}" for figure in (statistics.median(figures), min(figures), max(figures))))
            for name, figures in {**found, "process / thread": ratios}.items()
        ),
        note=(
            f"{rounds} rounds of {jobs} jobs of shapes in turn, {STEPS} steps, previews each 5, {torch_threads} torch "
            "thread(s). The ratio is that of each round."
        ),
    )
