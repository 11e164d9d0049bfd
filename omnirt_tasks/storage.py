"""The one way to a file system for artifacts and uploads: fsspec, safe names, one kind of error, nothing half kept."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from omnirt_tasks.errors import ConfigurationError, OmnirtError, StorageError

# Names are made by the server; whatever else a caller asks for is not there.
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# Storages without folders, whose `makedirs` looks for the bucket each time, and makes one of a name that is mistyped.
_BUCKETS = frozenset({"s3", "gs", "abfs"})


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the root path in it without a slash at its end.

    Connects to nothing. Raises ConfigurationError for a URL that fsspec does not know or has no library for.
    """
    try:
        fs, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme = url.partition("://")[0]
        raise ConfigurationError(
            f"There is no storage for URLs that begin with {scheme!r} ({type(error).__name__}).",
            "Set OMNIRT_ARTIFACT_URL to file:///FOLDER, or to s3://BUCKET/PATH with omnirt-tasks[s3] installed.",
        ) from error
    # Other processes write and remove too, so what was listed once says nothing of now.
    fs.dircache.use_listings_cache = False
    return fs, str(root).rstrip("/")


def is_local(fs: Any) -> bool:
    """Whether the file system's paths are paths of this machine."""
    return "file" in _protocols(fs)


def make_folder(fs: Any, path: str) -> None:
    """Make a folder and those above it, where the storage has folders; a bucket is the operator's to make."""
    if not _BUCKETS & _protocols(fs):
        fs.makedirs(path, exist_ok=True)


def reach_disk(fs: Any, paths: Sequence[str], root: str) -> None:
    """Return once the files, and the names of all folders from theirs up to `root`, outlive a loss of power.

    Does nothing where the storage is not a local folder: any other promises so much with its answer.
    """
    if not is_local(fs):
        return
    top = Path(root)
    folders = {folder for path in paths for folder in Path(path).parents if folder.is_relative_to(top)}
    for path in [*map(Path, paths), *sorted(folders, reverse=True)]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into StorageError; `what` begins its message."""
    try:
        yield
    except OmnirtError:
        raise
    except OSError as error:
        # The path in the error is the server's business; the log has it through the chain.
        raise _storage_error(what, error.strerror or type(error).__name__) from error
    except Exception as error:  # fsspec names no base for them: the client below each storage has errors of its own
        raise _storage_error(what, type(error).__name__) from error


def _protocols(fs: Any) -> frozenset[str]:
    return frozenset((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _storage_error(what: str, reason: str) -> StorageError:
    return StorageError(f"{what}: {reason}.", "Check the storage and its free space.")
