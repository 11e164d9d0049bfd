"""Artifacts and uploads: what goes in comes out, and nothing else can be reached."""

import io
import struct
import zlib
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from omnirt_tasks.artifacts import NO_ATTEMPT, ArtifactStorage
from omnirt_tasks.clock import unix_ms
from omnirt_tasks.errors import (
    ArtifactNotFound,
    ConfigurationError,
    StorageError,
    TooLarge,
    UnsupportedMediaType,
    UploadNotFound,
    ValidationFailed,
)
from omnirt_tasks.storage import open_filesystem
from omnirt_tasks.uploads import UploadStorage

UNSAFE = ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a" * 129, ".hidden"]


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return tmp_path.as_uri() if request.param == "file" else f"memory://{tmp_path.name}"


def uploads_at(url: str, clock_ms: int = 0) -> UploadStorage:
    return UploadStorage(url, ttl_s=60, max_bytes=200_000, max_pixels=1_000_000, clock_ms=lambda: clock_ms)


def png(width: int = 8, height: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of 50 megapixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 5_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1 + 10_000 // 8) * 5_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_published_file_is_read_back_under_its_attempt(url: str, tmp_path: Path) -> None:
    storage, file = ArtifactStorage(url), tmp_path / "image-0.png"
    file.write_bytes(b"pixels")

    storage.publish("job", 2, [file])

    assert storage.stat("job", 2, "image-0.png") == 6
    with storage.open("job", 2, "image-0.png") as stream:
        stream.seek(2)
        assert stream.read() == b"xels"
    with pytest.raises(ArtifactNotFound):
        storage.stat("job", 1, "image-0.png")


def test_what_is_removed_is_gone_and_removing_again_is_no_error(url: str, tmp_path: Path) -> None:
    storage, file = ArtifactStorage(url), tmp_path / "a.png"
    file.write_bytes(b"x")
    storage.publish("job", 1, [file])
    storage.publish("job", 2, [file])

    storage.remove_attempt("job", 1)
    assert storage.stat("job", 2, "a.png") == 1
    for _ in range(2):
        storage.remove_job("job")

    with pytest.raises(ArtifactNotFound):
        storage.stat("job", 2, "a.png")


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_artifact_name_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    storage = ArtifactStorage((tmp_path / "data").as_uri())

    for look in (storage.stat, storage.open, storage.local_path):
        with pytest.raises(ArtifactNotFound):
            look("job", 1, name)
        with pytest.raises(ArtifactNotFound):
            look(name, 1, "a.png")


def test_a_storage_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where a folder should be")
    file = tmp_path / "a.png"
    file.write_bytes(b"x")

    with pytest.raises(StorageError) as caught:
        ArtifactStorage((tmp_path / "data").as_uri()).publish("job", 1, [file])

    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    ("data", "mime"),
    [
        (png(), "image/png"),
        (b"RIFF\0\0\0\0WAVEfmt ", "audio/wav"),
        (b"fLaC" + bytes(20), "audio/flac"),
        (b"OggS" + bytes(20), "audio/ogg"),
        (b"ID3" + bytes(20), "audio/mpeg"),
    ],
)
def test_an_upload_is_known_by_its_bytes(url: str, tmp_path: Path, data: bytes, mime: str) -> None:
    uploads = uploads_at(url)

    upload = uploads.put("anna", io.BytesIO(data))

    assert (upload.mime, upload.size_bytes) == (mime, len(data))
    assert uploads.find("anna", upload.id) == upload
    uploads.fetch(upload.id, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_anothers_upload_is_not_found(url: str) -> None:
    uploads = uploads_at(url)
    upload = uploads.put("anna", io.BytesIO(png()))

    with pytest.raises(UploadNotFound):
        uploads.find("bert", upload.id)


def test_an_upload_whose_time_is_over_is_gone_and_swept(url: str) -> None:
    upload = uploads_at(url).put("anna", io.BytesIO(png()))
    later = uploads_at(url, clock_ms=60_001)

    with pytest.raises(UploadNotFound):
        later.find("anna", upload.id)
    assert later.sweep() == 1
    assert later.sweep() == 0
    with pytest.raises(UploadNotFound):
        uploads_at(url).find("anna", upload.id)


BROKEN_FACTS = [b"", b"{", b"\xff", b"[]", b'{"id": "a"}', b'{"expires_at_ms": "soon"}']


@pytest.mark.parametrize("facts", BROKEN_FACTS)
def test_facts_that_cannot_be_read_are_no_upload_and_stop_no_sweep(tmp_path: Path, facts: bytes) -> None:
    now = uploads_at(tmp_path.as_uri(), clock_ms=unix_ms())
    broken, sound = (now.put("anna", io.BytesIO(png())) for _ in range(2))
    (tmp_path / "uploads" / f"{broken.id}.json").write_bytes(facts)

    with pytest.raises(UploadNotFound):
        now.find("anna", broken.id)
    assert now.sweep() == 0
    assert now.find("anna", sound.id) == sound
    assert uploads_at(tmp_path.as_uri(), clock_ms=unix_ms() + 61_000).sweep() == 2
    assert not list((tmp_path / "uploads").iterdir())


def test_bytes_without_facts_are_swept_once_they_are_old(url: str) -> None:
    upload = uploads_at(url).put("anna", io.BytesIO(png()))
    fs, root = open_filesystem(url)
    fs.rm_file(f"{root}/uploads/{upload.id}.json")
    fs.touch(f"{root}/uploads/of somebody else.bin")

    assert uploads_at(url, clock_ms=unix_ms()).sweep() == 0
    assert uploads_at(url, clock_ms=unix_ms() + 61_000).sweep() == 1
    assert not fs.exists(f"{root}/uploads/{upload.id}.bin")
    assert fs.exists(f"{root}/uploads/of somebody else.bin")


def test_an_upload_that_cannot_be_removed_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = [uploads_at(tmp_path.as_uri()).put("anna", io.BytesIO(png())) for _ in range(3)]
    later = uploads_at(tmp_path.as_uri(), clock_ms=60_001)
    remove = LocalFileSystem.rm_file

    def refuse_one(self: LocalFileSystem, path: str) -> None:
        if uploads[1].id in path:
            raise PermissionError(13, "Permission denied")
        remove(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm_file", refuse_one)
        with pytest.raises(StorageError):
            later.sweep()
    assert {path.stem for path in (tmp_path / "uploads").iterdir()} == {uploads[1].id}
    assert later.sweep() == 1


def test_an_upload_whose_facts_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "pipe_file", full)
        with pytest.raises(StorageError, match="No space left"):
            uploads_at(tmp_path.as_uri()).put("anna", io.BytesIO(png()))
    assert not list((tmp_path / "uploads").iterdir())


@pytest.mark.parametrize("upload_id", UNSAFE)
def test_an_unsafe_upload_id_is_not_found(url: str, upload_id: str) -> None:
    with pytest.raises(UploadNotFound):
        uploads_at(url).find("anna", upload_id)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (bomb(), ValidationFailed),
        (png(2_000, 2_000), ValidationFailed),
        (png(64, 64)[:60], ValidationFailed),
        (b"", UnsupportedMediaType),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedMediaType),
        (b"GIF89a" + bytes(50), UnsupportedMediaType),
        (b"#!/bin/sh\nrm -rf /", UnsupportedMediaType),
        (bytes(200_001), TooLarge),
    ],
)
def test_what_is_no_good_picture_or_sound_is_refused(url: str, data: bytes, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        uploads_at(url).put("anna", io.BytesIO(data))


def test_the_bomb_is_small(tmp_path: Path) -> None:
    assert len(bomb()) < 20_000


@pytest.mark.parametrize("stuck", ["a", "b", "c"])
def test_a_job_whose_files_cannot_be_removed_stops_no_other_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str
) -> None:
    storage, file = ArtifactStorage(tmp_path.as_uri()), tmp_path / "0.png"
    file.write_bytes(b"x")
    for job_id in ("a", "b", "c"):
        storage.publish(job_id, 1, [file])
    remove = LocalFileSystem.rm

    def refuse_one(self: LocalFileSystem, path: str, **options: object) -> None:
        if path.endswith(f"/{stuck}"):
            raise PermissionError(13, "Permission denied")
        remove(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm", refuse_one)
        with pytest.raises(StorageError):
            storage.sweep_orphans(lambda _: NO_ATTEMPT, older_than_s=0)
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == {stuck}
    assert storage.sweep_orphans(lambda _: NO_ATTEMPT, older_than_s=0) == 1


def test_files_that_another_process_removes_at_the_same_time_leave_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder goes file by file, and whoever finds a file gone that was there a moment ago stops in the middle."""
    storage, file = ArtifactStorage(tmp_path.as_uri()), tmp_path / "0.png"
    file.write_bytes(b"x")
    storage.publish("job", 1, [file])
    remove = LocalFileSystem.rm
    met: list[str] = []

    def meet_another_once(self: LocalFileSystem, path: str, **options: object) -> None:
        if not met:
            met.append(path)
            raise FileNotFoundError(2, "No such file or directory")
        remove(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "rm", meet_another_once)
    storage.remove_job("job")

    assert met
    assert not list((tmp_path / "jobs").iterdir())


def test_what_is_kept_has_reached_the_disk_with_every_name_that_leads_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test can cut the power; that the disk was waited for can be seen."""
    synced: list[Path] = []

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path))

    monkeypatch.setattr("os.fsync", note)
    file = tmp_path / "0.png"
    file.write_bytes(b"x")

    ArtifactStorage((tmp_path / "data").as_uri()).publish("job", 1, [file])
    assert [str(path) for path in synced] == [
        "data/jobs/job/1/0.png",
        "data/jobs/job/1",
        "data/jobs/job",
        "data/jobs",
        "data",
    ]

    synced.clear()
    upload = uploads_at((tmp_path / "data").as_uri()).put("anna", io.BytesIO(png()))
    names = [f"data/uploads/{upload.id}.json", f"data/uploads/{upload.id}.bin", "data/uploads", "data"]
    assert [str(path) for path in synced] == names


@pytest.mark.parametrize("url", ["nothing://bucket/path", "gs://bucket/path"])
def test_a_storage_that_cannot_be_is_refused_at_the_start_with_what_to_set(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"'(nothing|gs)'.*OMNIRT_ARTIFACT_URL"):
        ArtifactStorage(url)
