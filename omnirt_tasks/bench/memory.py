"""The memory of each process over many jobs: it must not grow with their number."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psutil

from omnirt_tasks import requests
from omnirt_tasks.bench.figures import Row, Table
from omnirt_tasks.bench.running import running_system
from omnirt_tasks.client import Client
from omnirt_tasks.jobs.connection import connect

SAMPLES = 5
CLIENTS = 8
MIB = 1024 * 1024
# How a child of the system is known by its command line.
ROLES = {"valkey": "broker", "workers.device_child": "device's process", "celery": "worker", "serve": "gateway"}


def measure(jobs: int) -> Iterator[int | Table]:
    """Run `jobs` stub jobs, each watched to its end, and sample the memory; yields how many are done, then the table.

    After every fifth of the jobs their records are purged, so that what is kept on purpose does not count.
    """
    share = max(jobs // SAMPLES, 1)
    samples: list[Mapping[str, float]] = []
    with (
        running_system(["cpu-stub-stub"], preview_every_steps=2, placement="process") as (system, settings),
        Client(system.url) as client,
        closing(connect(settings.redis_url)) as redis,
    ):

        def one(number: int) -> str:
            job = client.submit(requests.text2image(model="stub", prompt="a", seed=number, num_inference_steps=4))
            return client.wait(job.id).id

        with ThreadPoolExecutor(CLIENTS) as pool:
            for sample in range(SAMPLES + 1):  # the first share warms up
                finished = list(pool.map(one, range(share)))
                list(pool.map(client.purge, finished))
                samples.append(_memory_mib() | {"data in the broker": redis.info("memory")["used_memory"] / MIB})
                yield (sample + 1) * share * SAMPLES // (SAMPLES + 1)
    first, last = samples[0], samples[-1]
    yield Table(
        title=f"Memory over {share * SAMPLES} jobs",
        columns=(*(f"after {share * (i + 1)} jobs, MiB" for i in range(SAMPLES + 1)), "growth, MiB"),
        rows=tuple(
            Row(role, (*(f"{taken[role]:.1f}" for taken in samples), f"{last[role] - first[role]:+.1f}"))
            for role in sorted(first)
        ),
        note="Resident memory (the sum of a role's processes), and what the broker says that its data take. "
        "The first share warms up; finished jobs are purged.",
    )


def _memory_mib() -> dict[str, float]:
    total: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        command = " ".join(process.cmdline())
        role = next((role for word, role in ROLES.items() if word in command), None)
        if role is not None:
            total[role] = total.get(role, 0.0) + process.memory_info().rss / MIB
    return total
