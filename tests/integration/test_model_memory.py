"""Memory really comes back: what a model took of this process is the system's again once the model is evicted."""

from pathlib import Path

import psutil
import pytest

from omnirt_tasks.registry import discover
from omnirt_tasks.registry.footprint import MIB, weights_bytes_by_dtype
from tests.support.hosts import Bench
from tests.support.outcomes import succeeded
from tests.support.tiny_models import save_tiny_sdxl, tiny_sdxl
from workers.backends import driver
from workers.thread_host import ThreadHost

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LARGE, SMALL = "sdxl-base-1.0", "sdxl-turbo"
LARGE_BYTES_MIN = 200 * MIB
COMES_BACK = 0.8


def save_large_sdxl(folder: Path) -> Path:
    """The tiny pipeline with a denoiser of some hundred megabytes."""
    import diffusers
    import torch

    pipeline = tiny_sdxl()
    config = {**pipeline.unet.config, "block_out_channels": (256, 768), "attention_head_dim": (8, 24)}
    with torch.random.fork_rng():
        pipeline.register_modules(unet=diffusers.UNet2DConditionModel.from_config(config))
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_the_memory_of_an_evicted_model_is_the_systems_again(tmp_path: Path) -> None:
    # Given a large and a small model, of which one is kept, and a host that has run before.
    folders = {LARGE: save_large_sdxl(tmp_path / "large"), SMALL: save_tiny_sdxl(tmp_path / "small")}
    large_bytes = weights_bytes_by_dtype(folders[LARGE], ["fp32"])["fp32"]
    assert large_bytes > LARGE_BYTES_MIN
    host = ThreadHost(
        backend=driver("cpu", torch_threads=1),
        models=[discover().find(model) for model in folders],
        folders=folders,
        cache_size=1,
        concurrency=1,
    )
    bench = Bench(host, LARGE, tmp_path)
    try:
        succeeded(bench.run(model=SMALL))
        before = resident_bytes()
        # When the large one is loaded, runs, and has to make room.
        succeeded(bench.run(model=LARGE, num_inference_steps=1))
        loaded = resident_bytes()
        succeeded(bench.run(model=SMALL))
        evicted = resident_bytes()
    finally:
        host.close()
    # Then the process has taken it, and has given it back.
    assert loaded - before > COMES_BACK * large_bytes
    assert loaded - evicted > COMES_BACK * large_bytes, f"{before=} {loaded=} {evicted=} {large_bytes=}"
