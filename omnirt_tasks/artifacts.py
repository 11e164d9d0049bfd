"""The outputs of jobs, on any fsspec storage.

    {root}/jobs/{job id}/{attempt}/{name}

Each attempt writes below its own number, and only the committed attempt is ever read: a late writer harms nobody.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

from omnirt_tasks.errors import ArtifactNotFound
from omnirt_tasks.storage import SAFE_NAME, is_local, open_filesystem, storage_errors


class ArtifactStorage:
    """Files of jobs below one fsspec URL. Safe to share between threads."""

    def __init__(self, url: str) -> None:
        """`url` is any that fsspec knows, as `file:///srv/omnirt` or `s3://bucket/path`; nothing is opened yet."""
        self._fs, self._root = open_filesystem(url)

    def publish(self, job_id: str, attempt: int, files: Sequence[Path]) -> None:
        """Copy the files into the attempt's folder. Raises StorageError; then the attempt has no result."""
        folder = self._folder(job_id, attempt)
        with storage_errors("The outputs could not be stored"):
            self._fs.makedirs(folder, exist_ok=True)
            for file in files:
                self._fs.put_file(str(file), f"{folder}/{file.name}")

    def stat(self, job_id: str, attempt: int, name: str) -> int:
        """The size in bytes. Raises ArtifactNotFound, also for a name that no artifact can have."""
        path = self._file(job_id, attempt, name)
        with storage_errors("The output could not be read"):
            try:
                return int(self._fs.size(path))
            except FileNotFoundError:
                raise _missing(name) from None

    def open(self, job_id: str, attempt: int, name: str) -> BinaryIO:
        """The artifact as a seekable stream. Raises ArtifactNotFound."""
        path = self._file(job_id, attempt, name)
        with storage_errors("The output could not be read"):
            try:
                return cast(BinaryIO, self._fs.open(path, "rb"))
            except FileNotFoundError:
                raise _missing(name) from None

    def fetch(self, job_id: str, attempt: int, name: str, target: Path) -> None:
        """Copy the artifact to a local file. Raises ArtifactNotFound."""
        path = self._file(job_id, attempt, name)
        with storage_errors("The output could not be read"):
            try:
                self._fs.get_file(path, str(target))
            except FileNotFoundError:
                raise _missing(name) from None

    def local_path(self, job_id: str, attempt: int, name: str) -> Path | None:
        """The artifact's path where the storage is a local folder, else None. Raises ArtifactNotFound."""
        path = self._file(job_id, attempt, name)
        return Path(path) if is_local(self._fs) else None

    def remove_attempt(self, job_id: str, attempt: int) -> None:
        """Remove what an attempt wrote. Idempotent."""
        self._remove(self._folder(job_id, attempt))

    def remove_job(self, job_id: str) -> None:
        """Remove what all attempts of a job wrote. Idempotent."""
        if not SAFE_NAME.fullmatch(job_id):
            raise _missing(job_id)
        self._remove(f"{self._root}/jobs/{job_id}")

    def _remove(self, folder: str) -> None:
        with storage_errors("The outputs could not be removed"):
            try:
                self._fs.rm(folder, recursive=True)
            except FileNotFoundError:
                return  # that it is gone is what was asked for

    def _folder(self, job_id: str, attempt: int) -> str:
        if not SAFE_NAME.fullmatch(job_id):
            raise _missing(job_id)
        return f"{self._root}/jobs/{job_id}/{attempt:d}"

    def _file(self, job_id: str, attempt: int, name: str) -> str:
        if not SAFE_NAME.fullmatch(name):
            raise _missing(name)
        return f"{self._folder(job_id, attempt)}/{name}"


def _missing(name: str) -> ArtifactNotFound:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return ArtifactNotFound(f"There is no artifact {shown!r}.", "The job's result names its artifacts.")
