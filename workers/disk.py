"""The worker's own disk, where jobs have their scratch folders: when it is full, no job is to blame."""

import errno

from omnirt_tasks.errors import StorageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def full_disk(error: BaseException) -> StorageError | None:
    """The error to tell of where `error`, or what led to it, is that the disk is full; None where it is not."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in FULL:
            return StorageError("The worker's disk is full.", "Try again later; the operator has to make room.")
        link = link.__cause__ or link.__context__
    return None
