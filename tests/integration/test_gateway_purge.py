"""A purged job leaves nothing, also where a real worker ran it: no key, no file."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.client import Client
from omnirt_tasks.contract import JobState
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.local_files import data_url
from omnirt_tasks.requests import text2image
from omnirt_tasks.settings import Settings
from omnirt_tasks.validation import parse_request
from tests.support.files import files_in
from tests.support.gateway import QUEUE, REQUEST, code_of, gateway_settings, png, running_gateway
from tests.support.processes import Processes
from tests.support.waiting import eventually
from web.app import create_app
from web.services import build


@pytest.fixture
def system(settings: Settings, processes: Processes) -> Iterator[tuple[Client, Any]]:
    """A client of a gateway with a stub worker behind it, and their Redis."""
    processes.worker(settings, QUEUE)
    _, url = processes.gateway(settings)
    redis = connect(settings.redis_url)
    with Client(url) as client:
        yield client, redis
    redis.close()


def picture(settings: Settings) -> Path:
    file = settings.run_dir / "red.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(64, 64))
    return file


def keys_of(redis: Any, settings: Settings, job_id: str) -> set[str]:
    """The keys that name the job, or hold it."""
    keys = set(redis.keys(f"{settings.key_prefix}:*"))
    readers = {
        "string": redis.get,
        "hash": redis.hgetall,
        "zset": lambda key: redis.zrange(key, 0, -1),
        "list": lambda key: redis.lrange(key, 0, -1),
        "set": redis.smembers,
        "stream": redis.xrange,
    }
    return {key for key in keys if job_id in key or job_id in str(readers[redis.type(key)](key))}


@pytest.mark.parametrize("pictures", [1, 8], ids=["whole", "in parts"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeded", "failed"])
def test_a_job_that_a_worker_ran_is_gone_from_redis_and_from_the_storage(
    system: tuple[Client, Any], settings: Settings, fails: bool, pictures: int
) -> None:
    client, redis = system
    config: dict[str, Any] = {"num_images_per_prompt": pictures, **({"fail_at_step": 1} if fails else {})}
    job = client.submit(text2image(model="stub", prompt="x", num_inference_steps=2, **config), idempotency_key="k")
    done = client.wait(job.id, timeout_s=20)
    assert done.state is (JobState.FAILED if fails else JobState.SUCCEEDED)
    parts = 0 if job.parts is None else job.parts.total
    assert bool(parts) == (pictures > 1)
    metas = f"{settings.key_prefix}:celery:celery-task-meta-{job.id}*"  # of the job, and of each part
    eventually(lambda: [redis.get(meta) for meta in redis.keys(metas)])
    eventually(lambda: not [meta for meta in redis.keys(metas) if "STARTED" in redis.get(meta)])

    client.purge(job.id)

    assert keys_of(redis, settings, job.id) == set()
    assert not [file for file in files_in(settings.data_dir) if job.id in str(file)]


def test_the_inputs_that_came_in_a_request_go_with_their_job_and_no_others(
    system: tuple[Client, Any], settings: Settings
) -> None:
    client, _ = system
    mine = client.upload(picture(settings))
    files = next(settings.data_dir.rglob("uploads"))
    inputs = {"prompt": "x", "image": data_url(picture(settings))}
    request = parse_request({"task": "image2image", "model": "sdxl-base-1.0", "backend": "cuda", "inputs": inputs})
    before = set(files.iterdir())

    job = client.submit(request)
    client.cancel(job.id)
    again = client.retry(job.id)
    client.purge(job.id)

    assert len(set(files.iterdir()) - before) == 2, "the retry has its own"
    client.purge(again.id)
    assert set(files.iterdir()) == before
    assert mine.removeprefix("upload:") in {file.stem for file in before}


def test_a_purge_that_the_storage_stopped_can_be_done_again(redis_url: str, tmp_path: Path) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path)) as gateway:
        job_id = gateway.finished()
        folder = next(gateway.settings.data_dir.rglob(job_id))
        jobs, aside = folder.parent, folder.parent.with_name("aside")
        jobs.rename(aside)
        jobs.write_text("the storage is away: there is a file in the place of a folder")
        stopped = gateway.http.delete(f"/v1/jobs/{job_id}?purge=true")
        jobs.unlink()
        aside.rename(jobs)

        assert (stopped.status_code, code_of(stopped)) == (503, "storage_error")
        assert gateway.http.delete(f"/v1/jobs/{job_id}?purge=true").status_code == 204
        assert not folder.exists()


def test_a_retry_is_accepted_though_its_job_is_purged_at_that_moment(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = gateway_settings(redis_url, tmp_path)
    with closing(build(settings)) as parts:
        http, store = create_app(settings, parts).test_client(), parts.store
        job_id = http.post("/v1/jobs", json=REQUEST).get_json()["id"]
        store.cancel(job_id)
        forget = store.forget_dead_letter

        def overtaken(asked: str) -> None:
            store.purge(asked)
            forget(asked)

        monkeypatch.setattr(store, "forget_dead_letter", overtaken)
        answer = http.post(f"/v1/jobs/{job_id}/retry")

        assert (answer.status_code, answer.get_json()["state"]) == (202, "queued")
