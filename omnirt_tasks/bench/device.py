"""What a device's host costs on a real GPU: pictures per second of an SDXL-sized model, against the raw pipeline.

    random weights, made on the device ─┬─► the pipeline called in a loop, here
                                        └─► a folder ─► the host, in a process of its own ─► two jobs at a time

Nothing is downloaded: what a step costs does not depend on what the weights are.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnirt_tasks.bench.figures import Row, Table
from omnirt_tasks.bench.random_weights import sdxl_sized
from omnirt_tasks.contract import Backend, Inputs, ResolvedRequest, Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import ConfigurationError, OperatorError
from omnirt_tasks.registry import discover

if TYPE_CHECKING:
    from workers.host import DeviceHost
    from workers.process_host import ProcessHost

RAW, HOST = "raw pipeline", "through the host"
MODEL = "sdxl-base-1.0"
PROMPT = "a lighthouse on a cliff in a storm"
SIZE_PX = 1024
GUIDANCE = 7.5
DTYPE = "bf16"
# While one job's picture is written, the next is drawn.
AT_ONCE = 2
RATIO_MIN = 0.97
START_TIMEOUT_S = 300.0
START_POLL_S = 0.05


def measure(rounds: int, pictures: int, steps: int, device: str) -> Iterator[int | Table]:
    """Draw `pictures` in a loop and through the host, in turns; yields the rounds done, then the table.

    Takes about 7 GiB of the temporary folder's disk, and two copies of the model on the device. Raises
    ConfigurationError where there is no such CUDA device, OperatorError when a job of the host fails.
    """
    name = _device_name(device)
    rates: dict[str, list[float]] = {RAW: [], HOST: []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omnirt-bench-")))
        pipeline = sdxl_sized(device)
        pipeline.save_pretrained(folder / "weights", safe_serialization=True)
        host = stack.enter_context(_host(device, folder / "weights"))
        sides: Mapping[str, Callable[[range], None]] = {
            RAW: lambda seeds: _draw(pipeline, seeds, steps, folder),
            HOST: lambda seeds: _draw_through(host, seeds, steps, folder),
        }
        for draw in sides.values():
            draw(range(AT_ONCE))  # weights are loaded, kernels chosen, memory is taken
        for done in range(1, rounds + 1):
            seeds = range(done * pictures, (done + 1) * pictures)
            for side, draw in sides.items():
                started = time.perf_counter()
                draw(seeds)
                rates[side].append(pictures / (time.perf_counter() - started))
            yield done
    yield _table(rates, name, pictures, steps)


def _device_name(device: str) -> str:
    from workers.backends.probing import probe_apart

    found = {info.device: info.name for info in probe_apart(Backend.CUDA)}
    if device not in found:
        raise ConfigurationError(
            f"This host has no CUDA device {device!r}; it has {', '.join(found) or 'none'}.",
            "Run this bench on a host with a GPU, with a torch that is built for CUDA, or name another --device.",
        )
    return found[device]


@contextmanager
def _host(device: str, weights: Path) -> Iterator["ProcessHost"]:
    """A host in a process of its own, ready."""
    from workers.host import HostConfig
    from workers.process_host import ProcessHost

    config = HostConfig(
        backend=Backend.CUDA,
        device=device,
        models=(MODEL,),
        folders={MODEL: weights},
        cache_size=1,
        concurrency=AT_ONCE,
    )
    host = ProcessHost(config, on_line=lambda _: None)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not host.health().ok:
            if time.monotonic() > deadline_s:
                raise OperatorError(f"The device's process is not ready: {host.health().detail}")
            time.sleep(START_POLL_S)
        yield host
    finally:
        host.close()


def _draw(pipeline: Any, seeds: range, steps: int, folder: Path) -> None:
    """Pictures in a loop, as the pipeline's documentation tells to draw them."""
    import torch

    for seed in seeds:
        drawn = pipeline(
            prompt=PROMPT,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            width=SIZE_PX,
            height=SIZE_PX,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        drawn.images[0].save(folder / "raw.png")


def _draw_through(host: "DeviceHost", seeds: range, steps: int, folder: Path) -> None:
    """The same pictures as jobs of the host, AT_ONCE at a time."""
    from workers.host import RunOrder, RunSucceeded

    def job(seed: int) -> None:
        output_dir = Path(tempfile.mkdtemp(dir=folder))
        order = RunOrder(f"bench-{seed}", 1, _request(steps, seed), output_dir)
        outcome = host.submit(order, lambda _: None).result()
        if not isinstance(outcome, RunSucceeded):
            raise OperatorError(f"A job of the bench failed: {outcome}")
        shutil.rmtree(output_dir)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(job, seeds))


def _request(steps: int, seed: int) -> ResolvedRequest:
    task = discover().find(MODEL).tasks[Task.TEXT2IMAGE]
    usual: JsonObject = {name: option.default for name, option in task.options.items()}
    wishes: JsonObject = {
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "width": SIZE_PX,
        "height": SIZE_PX,
        "scheduler": "native",
        "dtype": DTYPE,
    }
    return ResolvedRequest(
        task=Task.TEXT2IMAGE, model=MODEL, backend=Backend.CUDA, inputs=Inputs(prompt=PROMPT), config=usual | wishes
    )


def _table(rates: Mapping[str, list[float]], device_name: str, pictures: int, steps: int) -> Table:
    ratio = statistics.median(ours / plain for ours, plain in zip(rates[HOST], rates[RAW], strict=True))
    verdict = "reached" if ratio >= RATIO_MIN else "missed"
    return Table(
        title=f"SDXL-sized pictures on {device_name}",
        columns=("pictures/s (median)", "least", "most"),
        rows=(
            *(
                Row(side, (f"{statistics.median(found):.3f}", f"{min(found):.3f}", f"{max(found):.3f}"))
                for side, found in rates.items()
            ),
            Row("host / raw", (f"{ratio:.3f}", f"at least {RATIO_MIN}", verdict)),
        ),
        note=(
            f"{len(rates[RAW])} rounds of {pictures} pictures in turn, {SIZE_PX}x{SIZE_PX}, {steps} steps, {DTYPE}, "
            f"random weights. Raw: the classic pipeline in a loop. Host: {AT_ONCE} jobs at a time through the process "
            "placement. Both store their PNG. The ratio is the median over the rounds."
        ),
    )
