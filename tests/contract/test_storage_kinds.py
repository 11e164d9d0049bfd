"""Artifacts, checkpoints and uploads on every kind of storage: a local folder, memory, and a server that speaks S3."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omnirt_tasks.artifacts import NO_ATTEMPT, ArtifactStorage
from omnirt_tasks.clock import unix_ms
from omnirt_tasks.errors import ArtifactNotFound, JobNotFound, StorageError, StoreUnavailable, UploadNotFound
from omnirt_tasks.storage import open_filesystem
from omnirt_tasks.uploads import UploadStorage
from tests.support.gateway import png
from tests.support.s3 import S3Server, own_s3

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with own_s3() as server:
        yield server


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, s3: S3Server, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{s3.bucket()}/some/path"
    return tmp_path.as_uri() if request.param == "file" else f"memory://{tmp_path.name}"


@pytest.fixture
def storage(url: str) -> ArtifactStorage:
    return ArtifactStorage(url)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Makes a local file of that name."""

    def make(name: str = "0.png", content: bytes = b"pixels") -> Path:
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def stored(url: str) -> list[str]:
    """What lies below the storage's root, as {job}/{attempt}/{name}."""
    fs, root = open_filesystem(url)
    return sorted(str(path).removeprefix(f"{root}/jobs/") for path in fs.find(f"{root}/jobs"))


def knows(attempts: dict[str, int | None]) -> Callable[[str], int | None]:
    """A store that knows these jobs alone."""

    def attempt_that_counts(job_id: str) -> int | None:
        if job_id not in attempts:
            raise JobNotFound(f"There is no job {job_id}.")
        return attempts[job_id]

    return attempt_that_counts


def test_a_published_file_is_read_back_whole_in_part_and_as_a_copy(
    storage: ArtifactStorage, made: Callable[..., Path], tmp_path: Path
) -> None:
    content = os.urandom(6_000_000)  # more than one block of a remote reader
    storage.publish("job", 2, [made("a.bin", content), made("b.png")])

    assert storage.stat("job", 2, "a.bin") == len(content)
    with storage.open("job", 2, "a.bin") as stream:
        stream.seek(5_500_000)
        assert stream.read(100) == content[5_500_000:5_500_100]
        stream.seek(0)
        assert stream.read() == content
    storage.fetch("job", 2, "b.png", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"pixels"


def test_what_is_not_there_is_not_found_however_it_is_asked_for(storage: ArtifactStorage, tmp_path: Path) -> None:
    for ask in (
        lambda: storage.stat("job", 1, "a.png"),
        lambda: storage.open("job", 1, "a.png"),
        lambda: storage.fetch("job", 1, "a.png", tmp_path / "copy"),
        lambda: storage.fetch_checkpoint("job", 1, "step-4", tmp_path / "copy"),
    ):
        with pytest.raises(ArtifactNotFound):
            ask()


def test_what_another_process_writes_after_a_look_is_seen_at_the_next(url: str, made: Callable[..., Path]) -> None:
    here = ArtifactStorage(url)
    type(open_filesystem(url)[0]).clear_instance_cache()  # or both would share what one of them has listed
    there = ArtifactStorage(url)
    store = knows({"running": None, "failed": NO_ATTEMPT})
    there.publish("running", 1, [made()])
    assert here.sweep_orphans(store, older_than_s=HOUR_S) == 0

    there.publish("failed", 1, [made()])

    assert here.sweep_orphans(store, older_than_s=HOUR_S) == 1


def test_a_checkpoint_comes_back_and_is_dropped_and_dropping_it_again_is_no_error(
    storage: ArtifactStorage, made: Callable[..., Path], tmp_path: Path
) -> None:
    storage.keep_checkpoint("job", 1, made("step-4", b"four"))
    storage.keep_checkpoint("job", 1, made("step-8", b"eight"))

    storage.fetch_checkpoint("job", 1, "step-8", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"eight"
    for _ in range(2):
        storage.drop_checkpoint("job", 1, "step-4")
    with pytest.raises(ArtifactNotFound):
        storage.fetch_checkpoint("job", 1, "step-4", tmp_path / "copy")
    storage.fetch_checkpoint("job", 1, "step-8", tmp_path / "copy")


def test_of_a_job_that_is_over_only_the_outputs_of_the_attempt_that_counts_are_kept(
    url: str, storage: ArtifactStorage, made: Callable[..., Path]
) -> None:
    for attempt in (1, 2, 10):
        storage.publish("job", attempt, [made()])
        storage.keep_checkpoint("job", attempt, made("step-4"))
    storage.publish("neighbour", 1, [made()])

    for _ in range(2):
        storage.keep_only("job", 10)
    assert stored(url) == ["job/10/0.png", "neighbour/1/0.png"]

    for _ in range(2):
        storage.keep_only("job", None)
    assert stored(url) == ["neighbour/1/0.png"]


def test_a_job_whose_outputs_are_purged_has_none(url: str, storage: ArtifactStorage, made: Callable[..., Path]) -> None:
    storage.publish("job", 1, [made()])
    storage.keep_checkpoint("job", 1, made("step-4"))
    for _ in range(2):
        storage.remove_job("job")
    assert not stored(url)


def test_a_sweep_removes_what_no_attempt_that_counts_has_written(
    url: str, storage: ArtifactStorage, made: Callable[..., Path]
) -> None:
    for job_id in ("done", "failed", "running"):
        for attempt in (1, 2):
            storage.publish(job_id, attempt, [made()])
            storage.keep_checkpoint(job_id, attempt, made("step-4"))
    storage.publish("whole", 1, [made()])
    store = knows({"done": 2, "failed": NO_ATTEMPT, "running": None, "whole": 1})

    assert storage.sweep_orphans(store, older_than_s=HOUR_S) == 2

    running = [f"running/{attempt}/{name}" for attempt in (1, 2) for name in ("0.png", "checkpoints/step-4")]
    assert stored(url) == ["done/2/0.png", *running, "whole/1/0.png"]
    assert storage.sweep_orphans(store, older_than_s=HOUR_S) == 0


def test_a_sweep_of_a_storage_that_was_never_written_to_finds_nothing(storage: ArtifactStorage) -> None:
    assert storage.sweep_orphans(knows({}), older_than_s=HOUR_S) == 0


def test_a_sweep_that_asks_the_wrong_redis_removes_nothing_that_is_young(
    url: str, storage: ArtifactStorage, made: Callable[..., Path]
) -> None:
    for attempt in (1, 2):
        storage.publish("unknown", attempt, [made()])

    assert storage.sweep_orphans(knows({}), older_than_s=HOUR_S) == 0
    assert len(stored(url)) == 2
    assert storage.sweep_orphans(knows({}), older_than_s=-HOUR_S) == 1
    assert not stored(url)


def test_a_sweep_ends_when_the_store_is_away_and_has_removed_nothing(
    url: str, storage: ArtifactStorage, made: Callable[..., Path]
) -> None:
    storage.publish("job", 1, [made()])

    def away(job_id: str) -> int | None:
        raise StoreUnavailable("Redis does not answer.")

    with pytest.raises(StoreUnavailable):
        storage.sweep_orphans(away, older_than_s=0.0)
    assert stored(url) == ["job/1/0.png"]


def test_an_upload_comes_back_until_its_time_is_over_and_is_swept_then(url: str, tmp_path: Path) -> None:
    def uploads(clock_ms: int) -> UploadStorage:
        return UploadStorage(url, ttl_s=60, max_bytes=10**6, max_pixels=10**6, clock_ms=lambda: clock_ms)

    now = unix_ms()
    first = uploads(now - 90_000).put("anna", io.BytesIO(png()))
    assert uploads(now - 90_000).sweep() == 0
    second = uploads(now).put("anna", io.BytesIO(png()))

    assert uploads(now).sweep() == 1
    assert uploads(now).sweep() == 0
    with pytest.raises(UploadNotFound):
        uploads(now - 90_000).find("anna", first.id)
    assert uploads(now).find("anna", second.id) == second
    uploads(now).fetch(second.id, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == png()


def test_upload_bytes_without_their_facts_are_swept_once_they_are_old(url: str) -> None:
    def uploads(clock_ms: int) -> UploadStorage:
        return UploadStorage(url, ttl_s=60, max_bytes=10**6, max_pixels=10**6, clock_ms=lambda: clock_ms)

    upload = uploads(unix_ms()).put("anna", io.BytesIO(png()))
    fs, root = open_filesystem(url)
    fs.rm_file(f"{root}/uploads/{upload.id}.json")

    assert uploads(unix_ms()).sweep() == 0
    assert uploads(unix_ms() + 61_000).sweep() == 1
    assert not fs.exists(f"{root}/uploads/{upload.id}.bin")


def test_a_bucket_that_is_not_there_is_a_storage_error_and_is_not_made(s3: S3Server, made: Callable[..., Path]) -> None:
    missing = ArtifactStorage("s3://nobody-made-this/path")
    for _ in range(2):
        with pytest.raises(StorageError):
            missing.publish("job", 1, [made()])
