"""What durability costs: the same work on brokers that differ in nothing but when their data reach the disk.

    over HTTP        POST /v1/jobs at a gateway of each broker           submits a second, and how long each takes
    on the store     claim, then commit, by several threads at once      steps a second

The brokers take their turns one after the other, so that each round compares like with like.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from omnirt_tasks import requests
from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.bench.figures import MS_PER_S, SPREAD_COLUMNS, Row, Table, percentile, spread_ms
from omnirt_tasks.bench.submit import OURS, PATHS, Load, ask, running_server
from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.values import Claim, Failed, Lease, NewJob
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import Fsync
from omnirt_tasks.validation import Door, resolve

OUTPUT_BYTES = 512 * 1024
OUTPUTS = 200
LEASE_MS = 600_000
JOB_TTL_S = 3600.0
QUEUE = "cpu-stub-bench"  # nobody serves it
OUTCOME = Failed(ErrorInfo(code="internal", message="The bench is over."))


@dataclass(frozen=True)
class Costs:
    """What one broker did in one turn."""

    submits: Load
    claims_per_s: float
    commits_per_s: float


def measure(rounds: int, seconds: float, clients: int, jobs: int) -> Iterator[int | Table]:
    """Load each broker in each of the rounds; yields how many are done, then the tables.

    `clients` submit over HTTP for `seconds`; then as many threads claim and commit `jobs` jobs.
    """
    found: dict[Fsync, list[Costs]] = {fsync: [] for fsync in Fsync}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omnirt-bench-")))
        brokers = {
            fsync: stack.enter_context(EmbeddedBroker(data_dir=folder / f"broker-{fsync}", fsync=fsync))
            for fsync in Fsync
        }
        ports = {
            fsync: stack.enter_context(running_server(OURS, broker.url, folder / f"gateway-{fsync}"))
            for fsync, broker in brokers.items()
        }
        for done in range(1, rounds + 1):
            for fsync, broker in brokers.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    submits = pool.apply(ask, (ports[fsync], PATHS[OURS], clients, seconds))
                found[fsync].append(Costs(submits, *_steps_per_s(broker.url, jobs, clients)))
            yield done
        copied, published = _outputs_s(folder)
    yield _broker_table(found, rounds, seconds, clients, jobs)
    yield Table(
        title="One output on a local folder",
        columns=SPREAD_COLUMNS,
        rows=(spread_ms("copied", copied), spread_ms("published: copied, and on the disk", published)),
        note=f"{len(published)} of each in turn, {OUTPUT_BYTES // 1024} KiB, each in a folder of its own.",
    )


def _steps_per_s(redis_url: str, jobs: int, threads: int) -> tuple[float, float]:
    """Claims and commits a second, on records of this turn's own."""
    client = connect(redis_url)
    try:
        store = RedisJobStore(client, prefix=f"bench-{uuid.uuid4().hex[:8]}", job_ttl_s=JOB_TTL_S)
        request = requests.text2image(model="stub", prompt="a large red circle", backend="cpu-stub")
        resolved, _ = resolve(request, discover(), door=Door(allow_stub=True)).unwrap()
        ids = [str(uuid.uuid4()) for _ in range(jobs)]
        for job_id in ids:
            store.create(NewJob(job_id, "", QUEUE, request.model_dump(mode="json"), resolved))

        def claim(job_id: str) -> Lease:
            claimed = store.claim(job_id, worker_id="bench", lease_ttl_ms=LEASE_MS)
            assert isinstance(claimed, Claim)
            return claimed.lease

        with ThreadPoolExecutor(threads) as pool:
            began_s = time.perf_counter()
            leases = list(pool.map(claim, ids))
            claimed_s = time.perf_counter()
            committed = list(pool.map(lambda lease: store.commit(lease, OUTCOME), leases))
            committed_s = time.perf_counter()
        assert all(committed)
        return jobs / (claimed_s - began_s), jobs / (committed_s - claimed_s)
    finally:
        client.close()


def _outputs_s(folder: Path) -> tuple[list[float], list[float]]:
    """How long one output takes to be copied, and to be published."""
    picture = folder / "0.png"
    picture.write_bytes(os.urandom(OUTPUT_BYTES))
    storage = ArtifactStorage((folder / "data").as_uri())
    copied: list[float] = []
    published: list[float] = []
    for number in range(OUTPUTS):
        began_s = time.perf_counter()
        target = folder / "copies" / str(number) / "1"
        target.mkdir(parents=True)
        shutil.copyfile(picture, target / picture.name)
        copied_s = time.perf_counter()
        storage.publish(str(number), 1, [picture])
        copied.append(copied_s - began_s)
        published.append(time.perf_counter() - copied_s)
    return copied, published


def _broker_table(found: dict[Fsync, list[Costs]], rounds: int, seconds: float, clients: int, jobs: int) -> Table:
    def row(fsync: Fsync) -> Row:
        costs = found[fsync]
        latencies = [latency for cost in costs for latency in cost.submits.latencies_s]
        against = zip(costs, found[Fsync.NO], strict=True)
        return Row(
            fsync.value,
            (
                f"{statistics.median(cost.submits.rate_per_s for cost in costs):.0f}",
                f"{percentile(latencies, 50) * MS_PER_S:.1f}",
                f"{percentile(latencies, 99) * MS_PER_S:.1f}",
                f"{statistics.median(cost.claims_per_s for cost in costs):.0f}",
                f"{statistics.median(cost.commits_per_s for cost in costs):.0f}",
                f"{statistics.median(its.submits.rate_per_s / bare.submits.rate_per_s for its, bare in against):.2f}",
            ),
        )

    return Table(
        title="What durability costs, by the broker's appendfsync",
        columns=("submits/s", "p50 ms", "p99 ms", "claims/s", "commits/s", "submits against no"),
        rows=tuple(map(row, Fsync)),
        note=(
            f"{rounds} rounds of {seconds:g} s of POST /v1/jobs by {clients} clients, then of {jobs} claims and "
            f"commits by {clients} threads, the brokers in turn. The ratio is the median over the rounds."
        ),
    )
