"""The one way to a file system for artifacts and uploads: fsspec, safe names, one kind of error."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from omnirt_tasks.errors import StorageError

# Names are made by the server; whatever else a caller asks for is not there.
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the root path in it without a slash at its end."""
    fs, root = fsspec.url_to_fs(url)
    return fs, str(root).rstrip("/")


def is_local(fs: Any) -> bool:
    """Whether the file system's paths are paths of this machine."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into StorageError; `what` begins its message."""
    try:
        yield
    except OSError as error:
        # The path in the error is the server's business; the log has it through the chain.
        raise StorageError(
            f"{what}: {error.strerror or type(error).__name__}.", "Check the storage and its free space."
        ) from error
