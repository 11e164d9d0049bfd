"""The checkpoints of jobs between two attempts: from one's folder to the storage, and from there to the next one's.

Nothing here fails a job: a checkpoint that cannot be kept, or is gone, costs the steps that are computed again.
"""

import logging
from pathlib import Path

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.errors import OmnirtError, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Checkpoint, StoredJob
from workers.attempts.runs import MadeCheckpoint, Run
from workers.host import HostEvent, RunOrder

logger = logging.getLogger(__name__)


class CheckpointKeeper:
    """Keeps the newest checkpoint of each run, and gives it to the next attempt. Safe to share between threads."""

    def __init__(self, store: JobStore, artifacts: ArtifactStorage) -> None:
        self._store = store
        self._artifacts = artifacts

    def hear(self, run: Run, order: RunOrder, event: HostEvent) -> None:
        """Offer the run the checkpoint that the event tells of. Never blocks."""
        match event.data:
            case {"step": int(step), "file": str(name)} if order.checkpoint_dir is not None:
                run.offer(MadeCheckpoint(step, order.checkpoint_dir / Path(name).name))
            case _:
                logger.error("A checkpoint cannot be kept: its event tells no step and file.")

    def keep(self, run: Run, made: MadeCheckpoint) -> None:
        """Store the file, note it in the job's record, and remove the one before."""
        lease = run.lease
        kept = Checkpoint(lease.attempt, made.file.name, made.step)
        try:
            run.kept_checkpoints = True
            self._artifacts.keep_checkpoint(lease.job_id, lease.attempt, made.file)
            if not self._store.checkpoint(lease, name=kept.name, step=kept.step):
                self._drop(lease.job_id, kept)  # the lease is lost; its keeper tells the run
                return
        except StoreUnavailable as error:  # whether the record knows this one or the last cannot be said: both stay
            logger.warning("The checkpoint of step %d is not noted: %s", made.step, error)
            return
        except OmnirtError as error:
            logger.warning("The checkpoint of step %d is not kept: %s", made.step, error)
            return
        finally:
            made.file.unlink(missing_ok=True)
        before, run.checkpoint = run.checkpoint, kept
        if before is not None:
            self._drop(lease.job_id, before)

    def fetch(self, job: StoredJob, target: Path) -> Path | None:
        """The job's newest checkpoint, copied to `target`; None if it has none, or it cannot be had."""
        checkpoint = job.checkpoint
        if checkpoint is None:
            return None
        try:
            self._artifacts.fetch_checkpoint(job.record.id, checkpoint.attempt, checkpoint.name, target)
        except OmnirtError as error:
            logger.warning("The job begins anew; its checkpoint of step %d cannot be had: %s", checkpoint.step, error)
            target.unlink(missing_ok=True)
            return None
        return target

    def _drop(self, job_id: str, checkpoint: Checkpoint) -> None:
        try:
            self._artifacts.drop_checkpoint(job_id, checkpoint.attempt, checkpoint.name)
        except OmnirtError as error:
            logger.warning("An outdated checkpoint stays until the job is over: %s", error)
