"""The outputs of jobs, on any fsspec storage.

    {root}/jobs/{job id}/{attempt}/{name}                  an output
    {root}/jobs/{job id}/{attempt}/checkpoints/{name}      what a later attempt may go on from

A part of a job that was split has a folder of its own, by its own id, as if it were a job.

Each attempt writes below its own number, and only the committed attempt is ever read: a late writer harms nobody, and
a file that is half there is seen by nobody. What belongs to no attempt that counts is removed when the job is over
(`keep_only`), and where that did not happen, by a search of the whole storage (`sweep_orphans`).
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from omnirt_tasks.errors import ArtifactNotFound, JobNotFound, StorageError
from omnirt_tasks.storage import SAFE_NAME, is_local, make_folder, open_filesystem, reach_disk, storage_errors

CHECKPOINTS = "checkpoints"
NO_ATTEMPT = 0
"""What counts of a job that is over without a result: attempts are numbered from 1."""


class ArtifactStorage:
    """Files of jobs below one fsspec URL. Safe to share between threads."""

    def __init__(self, url: str) -> None:
        """`url` is any that fsspec knows, as `file:///srv/omnirt` or `s3://bucket/path`; nothing is opened yet.

        Raises ConfigurationError for any other.
        """
        self._fs, self._root = open_filesystem(url)

    def publish(self, job_id: str, attempt: int, files: Sequence[Path]) -> None:
        """Copy the files into the attempt's folder; they outlive a loss of power when it returns.

        Raises StorageError; then the attempt has no result, and none of the files is left behind, where that can be.
        """
        folder = self._folder(job_id, attempt)
        paths = [f"{folder}/{file.name}" for file in files]
        with storage_errors("The outputs could not be stored"):
            try:
                make_folder(self._fs, folder)
                for file, path in zip(files, paths, strict=True):
                    self._fs.put_file(str(file), path)
                reach_disk(self._fs, paths, self._root)
            except BaseException:
                for path in paths:
                    with suppress(Exception):  # what stays is swept, and on a full disk every byte helps the next job
                        self._fs.rm_file(path)
                raise

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
        self._fetch(self._file(job_id, attempt, name), target)

    def local_path(self, job_id: str, attempt: int, name: str) -> Path | None:
        """The artifact's path where the storage is a local folder, else None. Raises ArtifactNotFound."""
        path = self._file(job_id, attempt, name)
        return Path(path) if is_local(self._fs) else None

    def keep_checkpoint(self, job_id: str, attempt: int, file: Path) -> None:
        """Copy a checkpoint to the attempt, under its file's name, which is not to be there yet.

        A loss of power may take it: then a later attempt begins at an earlier one, or anew. Raises StorageError.
        """
        path = self._checkpoint(job_id, attempt, file.name)
        with storage_errors("The checkpoint could not be stored"):
            try:
                make_folder(self._fs, path.rpartition("/")[0])
                self._fs.put_file(str(file), path)
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(path)
                raise

    def fetch_checkpoint(self, job_id: str, attempt: int, name: str, target: Path) -> None:
        """Copy a checkpoint to a local file. Raises ArtifactNotFound."""
        self._fetch(self._checkpoint(job_id, attempt, name), target)

    def drop_checkpoint(self, job_id: str, attempt: int, name: str) -> None:
        """Remove a checkpoint that a newer one has replaced. Idempotent."""
        self._remove(self._checkpoint(job_id, attempt, name))

    def keep_only(self, job_id: str, attempt: int | None) -> None:
        """Remove what a job that is over no longer needs: other attempts' files, and the kept one's checkpoints.

        With None, everything. Idempotent; it costs two looks at the storage where there is nothing to remove.
        """
        if attempt is None:
            self.remove_job(job_id)
        else:
            self._prune(job_id, attempt)

    def remove_attempt(self, job_id: str, attempt: int) -> None:
        """Remove what an attempt wrote. Idempotent."""
        self._remove(self._folder(job_id, attempt))

    def remove_job(self, job_id: str) -> None:
        """Remove what all attempts of a job wrote. Idempotent."""
        self._remove(self._job(job_id))

    def sweep_orphans(self, attempt_that_counts: Callable[[str], int | None], *, older_than_s: float) -> int:
        """Search the whole storage for files of no attempt that counts, remove them, and tell of how many jobs.

        `attempt_that_counts` gives the committed attempt of a job, NO_ATTEMPT for one that is over without a result,
        and None for one that is not over, whose files stay. Files of a job that it does not know (JobNotFound) go only
        when none of them is younger than `older_than_s`: a process that was pointed at the wrong Redis knows no job.
        One that cannot be removed stops no other; then raises StorageError in the end. Whatever else
        `attempt_that_counts` raises ends the search.
        """
        removed = 0
        failure: StorageError | None = None
        for job_id in (path.rpartition("/")[2] for path in self._list(f"{self._root}/jobs")):
            if not SAFE_NAME.fullmatch(job_id):
                continue  # none of ours
            try:
                removed += self._sweep_job(job_id, attempt_that_counts, older_than_s)
            except StorageError as error:
                failure = error
        if failure is not None:
            raise failure
        return removed

    def _sweep_job(self, job_id: str, attempt_that_counts: Callable[[str], int | None], older_than_s: float) -> bool:
        try:
            attempt = attempt_that_counts(job_id)
        except JobNotFound:
            if time.time() - self._written_at_s(job_id) < older_than_s:
                return False
            attempt = NO_ATTEMPT
        if attempt is None:
            return False
        if attempt == NO_ATTEMPT:
            return self._remove(self._job(job_id))
        return self._prune(job_id, attempt)

    def _written_at_s(self, job_id: str) -> float:
        """When the newest file of a job was written, in seconds since 1970."""
        folder = self._job(job_id)
        with storage_errors("The outputs could not be searched"):
            try:
                return max(float(self._fs.modified(path).timestamp()) for path in self._fs.find(folder) or [folder])
            except FileNotFoundError:  # somebody else has removed it just now
                return time.time()

    def _prune(self, job_id: str, attempt: int) -> bool:
        kept = self._folder(job_id, attempt)
        doomed = [path for path in self._list(self._job(job_id)) if path != kept]
        doomed += [path for path in self._list(kept) if path.endswith(f"/{CHECKPOINTS}")]
        return sum(map(self._remove, doomed)) > 0

    def _list(self, folder: str) -> list[str]:
        with storage_errors("The outputs could not be searched"):
            try:
                return [str(path).rstrip("/") for path in self._fs.ls(folder, detail=False)]
            except FileNotFoundError:
                return []

    def _remove(self, path: str) -> bool:
        """Remove a file, or a folder with all in it; whether there was one."""
        with storage_errors("The outputs could not be removed"):
            while True:
                try:
                    self._fs.rm(path, recursive=True)
                except FileNotFoundError:
                    if not self._fs.exists(path):
                        return False  # that it is gone is what was asked for
                    # Another process removes it too, and took a file just before this one: the rest may be left.
                else:
                    return True

    def _fetch(self, path: str, target: Path) -> None:
        with storage_errors("The output could not be read"):
            try:
                self._fs.get_file(path, str(target))
            except FileNotFoundError:
                raise _missing(path.rpartition("/")[2]) from None

    def _job(self, job_id: str) -> str:
        if not SAFE_NAME.fullmatch(job_id):
            raise _missing(job_id)
        return f"{self._root}/jobs/{job_id}"

    def _folder(self, job_id: str, attempt: int) -> str:
        return f"{self._job(job_id)}/{attempt:d}"

    def _file(self, job_id: str, attempt: int, name: str) -> str:
        if not SAFE_NAME.fullmatch(name):
            raise _missing(name)
        return f"{self._folder(job_id, attempt)}/{name}"

    def _checkpoint(self, job_id: str, attempt: int, name: str) -> str:
        if not SAFE_NAME.fullmatch(name):
            raise _missing(name)
        return f"{self._folder(job_id, attempt)}/{CHECKPOINTS}/{name}"


def _missing(name: str) -> ArtifactNotFound:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return ArtifactNotFound(f"There is no artifact {shown!r}.", "The job's result names its artifacts.")
