"""Files that hold how far a run has come: when the next is due, written whole, read only if whole. No torch.

    the run's step ─► CheckpointWriter ─► content, encoded by the executor ─► a file in the order's folder ─► CHECKPOINT
    the order's resume_from ─► read_checkpoint ─► content, for the executor to decode ─► RESUMED

A file begins with the SHA-256 of its content, so that one which was cut or changed is known for it.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from omnirt_tasks.registry.spec import Checkpointing
from workers.context import JobContext

log = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointUnusable(Exception):
    """The file holds nothing that this run can go on from."""


class StateNotKept(Exception):
    """The run's state holds something that no file can, whichever step it is at."""


class CheckpointWriter:
    """Keeps a run's state as often as its model asks for; a checkpoint that fails never fails its run.

    Used by the job's own thread alone.
    """

    def __init__(
        self, job: JobContext, checkpointing: Checkpointing | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` tells seconds; the first ones count from now."""
        self._job = job
        self._checkpointing = checkpointing
        self._clock = clock
        self._kept_at_s = clock()

    def after(self, step: int, total: int, content: Callable[[], bytes]) -> None:
        """Keep the state after step `step` of `total` if it is due; after the last one, what it leads to comes next.

        `content` gives the state in bytes, and may raise StateNotKept: the run then keeps none.
        """
        folder = self._job.order.checkpoint_dir
        if folder is None or step >= total or not self._is_due(step):
            return
        name = f"step-{step}.checkpoint"
        self._kept_at_s = self._clock()
        try:
            write_checkpoint(folder / name, content())
        except StateNotKept as reason:
            log.warning("this run keeps no checkpoints: %s", reason)
            self._checkpointing = None
        except Exception as error:  # recorded; the next one may fare better
            log.warning("a checkpoint could not be kept", extra={"step": step}, exc_info=error)
        else:
            self._job.checkpoint(step, name)

    def _is_due(self, step: int) -> bool:
        when = self._checkpointing
        if when is None:
            return False
        if when.every_steps is not None and step % when.every_steps == 0:
            return True
        return when.every_s is not None and self._clock() - self._kept_at_s >= when.every_s


def write_checkpoint(path: Path, content: bytes) -> None:
    """Write the file so that it is whole from the moment it has its name. Raises OSError."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # a full disk is not to stay full of halves


def read_checkpoint(path: Path) -> bytes:
    """The content of a file as `write_checkpoint` was given it. Raises CheckpointUnusable when that is not in it."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise CheckpointUnusable("it cannot be read") from error
    digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointUnusable("it is not whole")
    return content
