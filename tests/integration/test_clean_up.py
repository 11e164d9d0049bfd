"""What is no longer needed goes: expired jobs and uploads whole, and files of attempts that do not count."""

import io
import os
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from omnirt_tasks.contract import JobState
from omnirt_tasks.settings import Settings
from omnirt_tasks.stores import open_stores
from omnirt_tasks.uploads import UploadStorage
from tests.support.disks import read_only, small_disk
from tests.support.files import files_in
from tests.support.gateway import png
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.jobs import claimed, failed, new_job, succeeded
from tests.support.processes import Processes
from tests.support.waiting import eventually

WEEKS_S = 30 * 24 * 3600.0
GONE_S = 20.0


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"orphan_sweep_every_s": 0.3})


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    system = JobSystem(settings)
    yield system
    system.close()


def files(settings: Settings) -> set[str]:
    """Every file of jobs and uploads in the storage, by its place there."""
    places = {file.relative_to(settings.data_dir) for file in files_in(settings.data_dir)}
    return {str(place) for place in places if place.parts[0] != "chunks"}


def plant(settings: Settings, place: str, age_s: float = 0.0) -> str:
    """A file where an attempt would have written it, so old."""
    path = settings.data_dir / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"left behind")
    os.utime(path, (time.time() - age_s,) * 2)
    return place


def test_an_expired_job_leaves_nothing_in_redis_and_nothing_on_the_disk(
    settings: Settings, processes: Processes
) -> None:
    system = JobSystem(settings.model_copy(update={"job_ttl_s": 2.0}))
    try:
        processes.worker(system.settings, STUB_QUEUE)
        job = system.finished(system.submit())
        assert job.state is JobState.SUCCEEDED
        assert files(settings)

        def left() -> list[str]:
            return [str(key) for key in system.redis.scan_iter(match=f"*{job.id}*")] + sorted(files(settings))

        eventually(lambda: not left(), GONE_S, told=lambda: str(left()))
        assert system.redis.zscore(f"{settings.key_prefix}:finished", job.id) is None
    finally:
        system.close()


def test_an_expired_upload_is_removed_by_whatever_process_runs(settings: Settings, processes: Processes) -> None:
    uploads = UploadStorage(settings.storage_url, ttl_s=0.001, max_bytes=10**6, max_pixels=10**6)
    uploads.put("anna", io.BytesIO(png()))
    assert len(files(settings)) == 2
    processes.worker(settings, STUB_QUEUE)
    eventually(lambda: not files(settings), GONE_S)


def test_files_of_attempts_that_do_not_count_are_found_and_removed(
    settings: Settings, system: JobSystem, processes: Processes
) -> None:
    processes.worker(settings, STUB_QUEUE)
    done = system.finished(system.submit())
    failed = system.finished(system.submit(fail_at_step=1))
    waiting = system.submit(steps=200, step_ms=100)
    assert (done.state, failed.state) == (JobState.SUCCEEDED, JobState.FAILED)
    kept = files(settings)
    kept |= {
        plant(settings, f"jobs/{waiting}/7/0.png", WEEKS_S),
        plant(settings, "jobs/of-another-redis/1/0.png"),
    }
    orphans = {
        plant(settings, f"jobs/{done.id}/7/0.png"),
        plant(settings, f"jobs/{done.id}/{done.attempt}/checkpoints/step-4"),
        plant(settings, f"jobs/{failed.id}/1/0.png"),
        plant(settings, "jobs/long-gone/1/0.png", WEEKS_S),
    }

    eventually(lambda: not orphans & files(settings), GONE_S, told=lambda: str(orphans & files(settings)))

    assert files(settings) == kept
    system.store.cancel(waiting)
    system.finished(waiting)
    eventually(lambda: not any(waiting in file for file in files(settings)), GONE_S)


def test_the_files_of_a_part_count_once_its_whole_job_has_succeeded(settings: Settings, system: JobSystem) -> None:
    jobs = [system.store.create(new_job(parts=2)) for _ in range(3)]
    done, failing, running = jobs
    kept = set[str]()
    for job in jobs:
        lease = claimed(system.store, job.parts[0])
        system.store.commit(lease, succeeded("part", count=2))
        kept.add(plant(settings, f"jobs/{job.parts[0]}/1/0.png"))
    system.store.commit(claimed(system.store, done.parts[1]), succeeded("part", first=2, count=2))
    system.store.commit(claimed(system.store, failing.parts[1]), failed())
    kept |= {plant(settings, f"jobs/{done.parts[1]}/1/2.png"), plant(settings, f"jobs/{running.parts[1]}/1/2.png")}
    of_failed = {f"jobs/{failing.parts[0]}/1/0.png", plant(settings, f"jobs/{failing.parts[1]}/1/2.png")}
    kept -= of_failed
    orphans = of_failed | {plant(settings, f"jobs/{done.parts[0]}/7/0.png")}

    with closing(open_stores(settings)) as stores, closing(stores.reconciler(lambda _: None)) as reconciler:
        reconciler.start()
        eventually(lambda: not orphans & files(settings), GONE_S)
        assert files(settings) == kept

        system.store.purge(running.record.id)  # what asks for that has removed its files
        stores.remove_files(running)
        assert files(settings) == {file for file in kept if running.record.id not in file}


def test_an_expired_split_job_leaves_nothing_in_redis_and_nothing_on_the_disk(settings: Settings) -> None:
    settings = settings.model_copy(update={"job_ttl_s": 0.05})
    with closing(open_stores(settings)) as stores:
        job = stores.jobs.create(new_job(parts=2))
        for number, part in enumerate(job.parts):
            stores.jobs.commit(claimed(stores.jobs, part), succeeded("part", first=2 * number, count=2))
            plant(settings, f"jobs/{part}/1/{number}.png")
        with closing(stores.reconciler(lambda _: None)) as reconciler:
            reconciler.start()
            eventually(
                lambda: not files(settings) and not list(stores.client.scan_iter(match=f"*{job.record.id}*")), GONE_S
            )


def test_files_that_cannot_be_removed_keep_no_others_from_it_and_go_when_they_can(
    settings: Settings, processes: Processes
) -> None:
    with small_disk(settings.data_dir / "jobs" / "stuck", 64 * 1024) as disk:
        stuck = plant(settings, "jobs/stuck/1/0.png", WEEKS_S)
        others = {plant(settings, f"jobs/gone-{number}/1/0.png", WEEKS_S) for number in range(8)}
        with read_only(disk):
            worker = processes.worker(settings, STUB_QUEUE)
            eventually(lambda: not others & files(settings), GONE_S, told=lambda: str(others & files(settings)))
            assert files(settings) == {stuck}

        eventually(lambda: not files(settings), GONE_S)
        assert worker.exit_code is None
