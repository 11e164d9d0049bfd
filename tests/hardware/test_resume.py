"""A job that was broken off goes on on a device as it does on the CPU; skipped where there is none."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from omnirt_tasks.contract import EventName
from omnirt_tasks.registry import discover
from omnirt_tasks.registry.spec import Checkpointing
from tests.support.hosts import Bench, Recorder
from tests.support.outcomes import picture, succeeded
from tests.support.tiny_models import save_tiny_sdxl
from workers.backends import driver
from workers.host import RunOrder, RunOutcome
from workers.thread_host import ThreadHost

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Cold kernels.
RUN_TIMEOUT_S = 300.0
STEPS, KEPT = 9, 6
# The mean difference of a colour, of 255: what a device's own order of sums comes to.
TOLERANCE = 0.5


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.hardware("cuda")),
        pytest.param("ascend", marks=pytest.mark.hardware("ascend")),
    ]
)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    spec = dataclasses.replace(discover().find("sdxl-base-1.0"), checkpointing=Checkpointing(every_steps=KEPT))
    host = ThreadHost(
        backend=driver(request.param, f"{request.param}:0", torch_threads=1),
        models=[spec],
        folders={spec.id: save_tiny_sdxl(tmp_path / "tiny")},
        cache_size=1,
        concurrency=1,
    )
    yield Bench(host, spec.id, tmp_path)
    host.close()


def run(bench: Bench, order: RunOrder, recorder: Recorder) -> RunOutcome:
    return bench.host.submit(order, recorder).result(RUN_TIMEOUT_S)


def apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of a colour, of 255."""
    mean: list[Any] = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return float(max(mean))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("scheduler", ["dpm-solver", "euler-ancestral"])
def test_a_job_goes_on_on_the_device_with_the_picture_of_an_unbroken_run(
    bench: Bench, tmp_path: Path, scheduler: str, dtype: str
) -> None:
    wishes: dict[str, Any] = {"num_inference_steps": STEPS, "scheduler": scheduler, "dtype": dtype}
    unbroken, first = dataclasses.replace(bench.order(**wishes), checkpoint_dir=tmp_path), Recorder()
    succeeded(run(bench, unbroken, first))
    (kept,) = first.named(EventName.CHECKPOINT)

    resumed, second = (
        dataclasses.replace(bench.order(**wishes), resume_from=tmp_path / str(kept.data["file"])),
        Recorder(),
    )
    succeeded(run(bench, resumed, second))

    assert [event.data["step"] for event in second.named(EventName.RESUMED)] == [KEPT]
    assert second.progress[0] == (KEPT + 1, STEPS)
    assert apart(picture(resumed), picture(unbroken)) <= TOLERANCE
