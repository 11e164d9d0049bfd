"""What a process holds before, while and after it has a large model loaded."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil

from omnirt_tasks.registry import discover
from omnirt_tasks.registry.footprint import weights_bytes_by_dtype
from tests.support.hosts import Bench
from tests.support.outcomes import succeeded
from tests.support.tiny_models import save_tiny_sdxl, tiny_sdxl
from workers.backends import driver
from workers.thread_host import ThreadHost

LARGE, SMALL = "sdxl-base-1.0", "sdxl-turbo"


@dataclass(frozen=True)
class Residence:
    """Resident bytes of a process, and those of the large model's weights."""

    before: int
    loaded: int
    evicted: int
    weights: int


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


def load_and_evict(large: Path, folder: Path) -> Residence:
    """Run a small model, the large one, and the small one again, where one is kept; for a process of its own."""
    # The schedulers meet NumPy's newest wish in an old way of making arrays.
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
    folders = {LARGE: large, SMALL: save_tiny_sdxl(folder / "small")}
    host = ThreadHost(
        backend=driver("cpu", torch_threads=1),
        models=[discover().find(model) for model in folders],
        folders=folders,
        cache_size=1,
        concurrency=1,
    )
    bench = Bench(host, LARGE, folder)
    resident: list[int] = []
    try:
        for model in (SMALL, LARGE, SMALL):
            succeeded(bench.run(model=model, num_inference_steps=1))
            resident.append(int(psutil.Process().memory_info().rss))
    finally:
        host.close()
    before, loaded, evicted = resident
    return Residence(before, loaded, evicted, weights_bytes_by_dtype(large, ["fp32"])["fp32"])
