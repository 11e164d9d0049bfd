"""Whatever dies, however often: every accepted job ends once, with one result, and nothing is left behind.

make test-faults          1,000 jobs and 100 faults; in `make test` it is a shorter one
CAMPAIGN_SEED=7 CAMPAIGN_JOBS=300 CAMPAIGN_FAULTS=33 make test-faults
"""

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnirt_tasks.client import Client
from tests.support.campaign.audit import complaints, leftovers
from tests.support.campaign.cluster import Cluster
from tests.support.campaign.driver import Driver, Story
from tests.support.campaign.faults import Injector
from tests.support.campaign.plan import Fault, make_plan
from tests.support.disks import may_mount, small_disk
from tests.support.waiting import eventually

JOBS = int(os.environ.get("CAMPAIGN_JOBS", "120"))
FAULTS = int(os.environ.get("CAMPAIGN_FAULTS", "22"))
SEED = int(os.environ.get("CAMPAIGN_SEED", random.randrange(2**32)))
DISK_BYTES = 64 * 1024 * 1024
MENDED_S = 120.0  # longer than a message that a dead worker took stays with it


@pytest.fixture
def storage_dir(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, so that it can be filled, where one may be made."""
    if not may_mount():
        yield tmp_path / "data"
        return
    with small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


@pytest.fixture
def cluster(tmp_path: Path, storage_dir: Path) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path,
        storage_dir,
        lease_ttl_s=3.0,
        reconcile_every_s=0.5,
        unclaimed_after_s=2.0,
        heartbeat_s=0.5,
        grace_s=2.0,
        retry_backoff_s=0.5,
        orphan_sweep_every_s=2.0,
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
@pytest.mark.timeout(600 + 5 * JOBS)
def test_every_accepted_job_ends_once_and_nothing_is_left_whatever_dies(cluster: Cluster) -> None:
    plan = make_plan(SEED, JOBS, FAULTS, [fault for fault in Fault if fault is not Fault.DISK_FULL or may_mount()])
    _tell(f"campaign: seed {SEED}, {JOBS} jobs, {FAULTS} faults")
    over = threading.Semaphore(0)
    driver = Driver(plan, cluster.urls, lambda _: over.release())
    injector = Injector(cluster, random.Random(SEED), lambda: _some_job(driver.stories))
    callers = threading.Thread(target=driver.run, name="campaign-callers", daemon=True)
    began_s = time.monotonic()
    callers.start()
    try:
        for number, fault in enumerate(plan.faults):
            for _ in range(JOBS * number // FAULTS - JOBS * (number - 1) // FAULTS if number else 1):
                over.acquire()
            _tell(f"{time.monotonic() - began_s:6.1f} s  {fault}")
            injector.do(fault)
        callers.join()
    finally:
        injector.close()
    _tell(f"{time.monotonic() - began_s:6.1f} s  every caller has seen its jobs' ends")

    cluster.wait_ready()  # the last fault may have been a moment ago
    eventually(
        lambda: not list(leftovers(cluster.settings)), MENDED_S, told=lambda: "\n".join(leftovers(cluster.settings))
    )
    broken = list(complaints(driver.stories, cluster.settings, cluster.urls[0]))
    _report(driver.stories, cluster)
    assert not broken, "\n".join([f"CAMPAIGN_SEED={SEED}", *broken, cluster.tell()])
    assert not Path("unpickled").exists()


def _some_job(stories: list[Story]) -> str | None:
    known = [story.job_id for story in stories if story.job_id is not None]
    return random.choice(known) if known else None


def _report(stories: list[Story], cluster: Cluster) -> None:
    with Client(cluster.urls[0]) as client:
        jobs = [client.job(story.job_id) for story in stories if story.job_id is not None]
    ends = Counter((job.state.value, job.error.code if job.error else "") for job in jobs)
    _tell(f"ends: {dict(ends)}; attempts: {dict(sorted(Counter(job.attempt for job in jobs).items()))}")
    reports = [job.result.metadata for job in jobs if job.result is not None]
    _tell(
        f"{sum(report.batch_size > 1 for report in reports)} of {len(reports)} shared forward passes, "
        f"{sum(job.parts is not None for job in jobs)} were split"
    )
    _tell("\n".join(cluster.unforeseen))
    _tell("exits: " + ", ".join(f"{member.name} {dict(Counter(member.exits))}" for member in cluster.members))


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
